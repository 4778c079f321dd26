"""Tied output heads, according to the config and the tensors.

A config may say that both are one tensor, and a file may hold two. Where these are equal,
nothing is contradicted. Where they differ, the tensors are right: so reads transformers 5,
while its predecessors and other runtimes follow the config and ignore the head. Whatever is
written therefore says of a head that differs that it is not tied.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy

from loraformat.errors import InputError, printable
from loraformat.families.model_class import base_class, names_base_class, names_language_head
from loraformat.families.table import family_of
from loraformat.families.tensor_names import layer_of
from loraformat.model.checkpoint import Checkpoint, DenseTensor, LazyTensor, NF4Tensor
from loraformat.model.config_json import CONFIG_NAME, encode, members, parse, with_member
from loraformat.tensors.arrays import same_bytes

__all__ = [
    "HEAD",
    "TiedHead",
    "contradicting_head",
    "lacks_head",
    "refuse_lost_head",
    "settled",
    "tied_embedding",
    "tied_head",
    "untied_config",
]

HEAD = "lm_head.weight"
_FLAG = "tie_word_embeddings"
_EMBEDDINGS = (
    "embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight",
)  # fmt: skip
#: Members of a config that hold that of the language model within a larger one.
_LANGUAGE_MODELS = ("text_config", "language_config", "llm_config")
#: Elements that are compared at a time.
_TILE = 1 << 20


@dataclass(frozen=True, slots=True)
class TiedHead:
    """A head that shares the embedding's parameter.

    Attributes
    ----------
    embedding : str
        The tensor that is both.
    copy : str or None
        The head's own tensor, where the file holds the same numbers twice.
    """

    embedding: str
    copy: str | None = None


def tied_head(model: Checkpoint) -> TiedHead | None:
    """Return the tied head; None if the head is separate or missing.

    Numbers are compared only if the config says tied and the file has both tensors.
    """
    config = config_of(model)
    pair = _promised_pair(model.tensors, config)
    if pair is None:
        embedding = tied_embedding(model.tensors, config)
        return None if embedding is None else TiedHead(embedding)
    return TiedHead(*pair) if _same(*(model.tensors[name] for name in pair)) else None


def contradicting_head(model: Checkpoint) -> str | None:
    """Return the head that differs from the embedding although the config says tied, if any."""
    pair = _promised_pair(model.tensors, config_of(model))
    if pair is None or _same(*(model.tensors[name] for name in pair)):
        return None
    return pair[1]


def settled(model: Checkpoint) -> tuple[Checkpoint, list[str]]:
    """Return a model whose config agrees with its tensors on tying, and what was changed."""
    head = contradicting_head(model)
    if head is None or model.config is None:
        return model, []
    note = (
        f"{printable(head)} differs from the embedding, although config.json ties them: the "
        f"tensor is kept, and {_FLAG} is set to false"
    )
    return replace(model, config=untied_config(model.config)), [note]


def tied_embedding(names: Iterable[str], config: Mapping[str, Any]) -> str | None:
    """Return the embedding that is also the head, by name; None if nothing is tied.

    A head that is stored counts as one of its own; see `tied_head`.

    Examples
    --------
    >>> tied_embedding(["model.embed_tokens.weight"], {"architectures": ["LlamaForCausalLM"]})
    'model.embed_tokens.weight'
    """
    names = list(names)
    if _head(names) is not None or not names_language_head(config) or _flag(config) is False:
        return None
    return _embedding(names)


def lacks_head(names: Iterable[str], config: Mapping[str, Any]) -> bool:
    """Tell whether a model has no output head: it was saved from a base class, for embeddings.

    Nothing is tied, no head is stored, and the config names a class without one, or the tensors are
    called as in a base class: Qwen3-Embedding's config names ``Qwen3ForCausalLM``. A model of which
    a head is missing otherwise is incomplete.

    Examples
    --------
    >>> lacks_head(["model.embed_tokens.weight"], {"architectures": ["LlamaModel"]})
    True
    >>> causal = {"architectures": ["Qwen3ForCausalLM"]}
    >>> lacks_head(["embed_tokens.weight"], causal)
    True
    >>> lacks_head(["model.embed_tokens.weight"], causal)
    False
    """
    names = list(names)
    if _head(names) is not None or _says_tied(config):
        return False
    return names_base_class(config) or _embedding(names) in _EMBEDDINGS


def refuse_lost_head(model: Checkpoint) -> None:
    """Refuse a model without its output head, which loaders would initialise randomly.

    Its config names a class with a head and says, as transformers always writes, that it is not
    tied; and no tensor outside of the layers could be one, by whatever name.
    """
    config = config_of(model)
    embedding = _embedding(list(model.tensors))
    if embedding is None or not names_language_head(config) or _flag(config) is not False:
        return
    if lacks_head(model.tensors, config) or _may_be_head(model.tensors, embedding):
        return
    named = str(config["architectures"][0])
    raise InputError(
        f"tensor {HEAD} is missing: {CONFIG_NAME} names {printable(named)}, whose output head is "
        "not the embedding, and transformers would initialise it randomly",
        path=model.path,
        hint=f"download all weight files again; or, if the head is the embedding, write "
        f'"{_FLAG}": true into {CONFIG_NAME}; for an embedding model, which has no head, '
        f'"architectures": ["{printable(base_class(named))}"]',
    )


def untied_config(config: bytes) -> bytes:
    r"""Return ``config.json`` with ``tie_word_embeddings`` false, in nested configs too.

    Examples
    --------
    >>> untied_config(b'{"tie_word_embeddings": true}')
    b'{\n  "tie_word_embeddings": false\n}\n'
    """
    fields = members(config)
    for key in _LANGUAGE_MODELS:
        if isinstance(fields.get(key), dict):
            fields[key] = with_member(fields[key], _FLAG, False)
    return encode(with_member(fields, _FLAG, False))


def config_of(model: Checkpoint) -> dict[str, Any]:
    """Return a model's config; empty if it has none."""
    return parse(model.config, model.path) if model.config else {}


def _promised_pair(names: Iterable[str], config: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return embedding and head where both are stored and the config ties them."""
    names = list(names)
    embedding, head = _embedding(names), _head(names)
    if embedding is None or head is None:
        return None
    return (embedding, head) if _says_tied(config) else None


def _says_tied(config: Mapping[str, Any]) -> bool:
    named = _flag(config)
    return family_of(config).tied if named is None else named


def _may_be_head(tensors: Mapping[str, LazyTensor], embedding: str) -> bool:
    """Tell whether a tensor has the embedding's width and nearly all its rows."""
    rows, width = (*tensors[embedding].shape, 0, 0)[:2]
    return any(
        len(tensor.shape) == 2 and tensor.shape[1] == width and 2 * tensor.shape[0] >= rows
        for name, tensor in tensors.items()
        if name != embedding and layer_of(name) is None
    )


def _head(names: list[str]) -> str | None:
    return min((name for name in names if name.endswith(HEAD)), key=len, default=None)


def _embedding(names: list[str]) -> str | None:
    found = [name for name in names if name.endswith(_EMBEDDINGS)]
    text = [name for name in found if "vision" not in name and "audio" not in name]
    return text[0] if len(text) == 1 else None


def _flag(config: Mapping[str, Any]) -> bool | None:
    """Return ``tie_word_embeddings`` of a config; None if absent."""
    inner = [config[key] for key in _LANGUAGE_MODELS if isinstance(config.get(key), dict)]
    for fields in (config, *inner):
        if fields.get(_FLAG) is not None:
            return fields[_FLAG] is not False
    return None


def _same(one: LazyTensor, other: LazyTensor) -> bool:
    """Tell whether two tensors hold the same numbers."""
    if one.shape != other.shape:
        return False
    try:
        if isinstance(one, DenseTensor) and isinstance(other, DenseTensor):
            return _same_numbers(one, other)
        if isinstance(one, NF4Tensor) and isinstance(other, NF4Tensor):
            return one.load().by_suffix() == other.load().by_suffix()
        return False
    finally:
        one.release()
        other.release()


def _same_numbers(one: DenseTensor, other: DenseTensor) -> bool:
    if one.dtype == other.dtype and same_bytes(one.load(), other.load()):
        return True
    first, second = one.array().reshape(-1), other.array().reshape(-1)
    return all(
        numpy.array_equal(
            first[i : i + _TILE].astype(numpy.float64), second[i : i + _TILE].astype(numpy.float64)
        )
        for i in range(0, len(first), _TILE)
    )
