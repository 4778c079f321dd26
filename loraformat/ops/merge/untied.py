"""``config.json`` of a model whose head has become a tensor of its own."""

from __future__ import annotations

import json

from loraformat.config_json import parse

__all__ = ["untied_config"]


def untied_config(config: bytes) -> bytes:
    r"""Return ``config.json`` with ``tie_word_embeddings`` false.

    Examples
    --------
    >>> untied_config(b'{"tie_word_embeddings": true}')
    b'{\n  "tie_word_embeddings": false\n}\n'
    """
    fields = parse(config)
    inner = fields.get("text_config")
    if isinstance(inner, dict) and "tie_word_embeddings" in inner:
        inner["tie_word_embeddings"] = False
    keys = list(fields)
    fields["tie_word_embeddings"] = False
    if keys == sorted(keys):
        fields = dict(sorted(fields.items()))
    return (json.dumps(fields, indent=2) + "\n").encode()
