"""``config.json``: taking ``quantization_config`` out, and putting it in.

Everything else in the file stays as it was, and a file in the form that transformers
writes (two spaces, sorted keys) comes back byte for byte after a round trip.
"""

from __future__ import annotations

import json
from os import PathLike
from typing import Any

from loraformat import strict_json
from loraformat.errors import InputError

__all__ = ["CONFIG_NAME", "MAX_CONFIG_BYTES", "join", "model_dtype", "parse", "split", "with_dtype"]

CONFIG_NAME = "config.json"
#: Longest config that is read (bytes).
MAX_CONFIG_BYTES = 16 << 20

_MEMBER = "quantization_config"


def parse(raw: bytes, path: str | PathLike[str] = CONFIG_NAME) -> dict[str, Any]:
    """Return the config as an object.

    Raises
    ------
    InputError
        If it is not a strict JSON object.
    """
    try:
        config = strict_json.loads(raw)
    except strict_json.StrictJsonError as error:
        raise InputError(f"not strict JSON: {error}", path=path) from None
    if not isinstance(config, dict):
        raise InputError("not a JSON object", path=path)
    return config


def _encode(config: dict[str, Any]) -> bytes:
    return (json.dumps(config, indent=2, ensure_ascii=True) + "\n").encode("utf-8")


def split(
    raw: bytes, path: str | PathLike[str] = CONFIG_NAME
) -> tuple[bytes, dict[str, Any] | None]:
    r"""Separate the quantization from the rest.

    Returns
    -------
    config : bytes
        The file without ``quantization_config``; the very same bytes if it had none.
    quantization : dict or None

    Examples
    --------
    >>> split(b'{"model_type": "llama", "quantization_config": {"bits": 4}}')
    (b'{\n  "model_type": "llama"\n}\n', {'bits': 4})
    """
    config = parse(raw, path)
    if _MEMBER not in config:
        return raw, None
    quantization = config.pop(_MEMBER)
    if not isinstance(quantization, dict):
        raise InputError(f"{_MEMBER} is not an object", path=path)
    return _encode(config), quantization


def join(config: bytes, quantization: dict[str, Any]) -> bytes:
    """Return ``config.json`` with a ``quantization_config``, in its place if keys are sorted.

    Examples
    --------
    >>> join(b'{"a": 1, "z": 2}', {"bits": 4}).decode().split()
    ['{', '"a":', '1,', '"quantization_config":', '{', '"bits":', '4', '},', '"z":', '2', '}']
    """
    fields = parse(config)
    keys = list(fields)
    fields[_MEMBER] = quantization
    if keys == sorted(keys):
        fields = dict(sorted(fields.items()))
    return _encode(fields)


def model_dtype(config: bytes | None) -> str | None:
    """Return the dtype that a config names, as torch spells it.

    Examples
    --------
    >>> model_dtype(b'{"dtype": "bfloat16"}')
    'bfloat16'
    """
    fields = parse(config) if config else {}
    named = fields.get("dtype", fields.get("torch_dtype"))
    return named if isinstance(named, str) else None


def with_dtype(config: bytes, dtype: str) -> bytes:
    r"""Return ``config.json`` naming another dtype (torch's spelling), if it names one at all.

    Examples
    --------
    >>> with_dtype(b'{"dtype": "bfloat16"}', "float32")
    b'{\n  "dtype": "float32"\n}\n'
    """
    fields = parse(config)
    named = [key for key in ("dtype", "torch_dtype") if key in fields]
    if all(fields[key] == dtype for key in named):
        return config
    fields.update(dict.fromkeys(named, dtype))
    return _encode(fields)
