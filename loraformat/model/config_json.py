"""Reading ``config.json``, and rewriting single fields of it.

`parse` gives the values that transformers sees. What writes a config anew starts from `members`,
the values as they stand in the file, so that infinities keep the form that they have there. A file
in the form that transformers writes (two spaces, sorted keys) comes back byte for byte after
``quantization_config`` was taken out and put in again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any

from loraformat.errors import InputError, printable
from loraformat.storage.foreign_json import parse_object

__all__ = [
    "CONFIG_NAME",
    "MAX_CONFIG_BYTES",
    "encode",
    "join",
    "members",
    "model_dtype",
    "parse",
    "quantization",
    "split",
    "with_dtype",
    "with_member",
]

CONFIG_NAME = "config.json"
#: Longest config that is read (bytes).
MAX_CONFIG_BYTES = 16 << 20

_MEMBER = "quantization_config"
#: compressed-tensors' name of it until 2024.
_FORMER = "compression_config"
#: mlx-lm's, beside the usual one or without.
_MLX = "quantization"
#: What is asked of every config, whatever the model, may be absent or null.
_KINDS: dict[str, tuple[type, str]] = {
    "model_type": (str, "a string"),
    "architectures": (list, "a list of names"),
    "text_config": (dict, "an object"),
    "tie_word_embeddings": (bool, "true or false"),
}
#: transformers 5 writes ``{"__float__": "Infinity"}`` for a number that JSON has not.
_MARK = "__float__"
_MARKED = {"NaN": float("nan"), "Infinity": float("inf"), "-Infinity": float("-inf")}


def members(raw: bytes, path: str | PathLike[str] = CONFIG_NAME) -> dict[str, Any]:
    """Return the config's members as in the file, for editing and re-encoding.

    Raises `InputError` if it is not a JSON object.
    """
    return parse_object(raw, path)


def parse(raw: bytes, path: str | PathLike[str] = CONFIG_NAME) -> dict[str, Any]:
    r"""Return the config's values, as transformers sees them.

    Raises `InputError` if it is not a JSON object, or if a member that says which model it is has
    another type than transformers takes.

    Examples
    --------
    >>> parse(b'{"time_step_limit": [0.0, {"__float__": "Infinity"}]}')
    {'time_step_limit': [0.0, inf]}
    """
    found = {key: _unmarked(value) for key, value in members(raw, path).items()}
    for key, (kind, wanted) in _KINDS.items():
        value = found.get(key)
        if value is not None and not isinstance(value, kind):
            raise _wrong(f"{key} is {printable(value)}, wanted {wanted}", path)
    if not all(isinstance(name, str) for name in found.get("architectures") or ()):
        raise _wrong("architectures contains items that are not names", path)
    return found


def _wrong(problem: str, path: str | PathLike[str]) -> InputError:
    inside = "" if Path(path).name == CONFIG_NAME else f"{CONFIG_NAME}: "  # a model's directory
    return InputError(inside + problem, path=path)


def _unmarked(value: Any) -> Any:
    if isinstance(value, list):
        return [_unmarked(item) for item in value]
    if not isinstance(value, dict):
        return value
    mark = value.get(_MARK)
    if len(value) == 1 and isinstance(mark, str) and mark in _MARKED:
        return _MARKED[mark]
    return {key: _unmarked(item) for key, item in value.items()}


def encode(fields: dict[str, Any]) -> bytes:
    """Return the text of a config, given its `members`."""
    return (json.dumps(fields, indent=2, ensure_ascii=True) + "\n").encode("utf-8")


def split(
    raw: bytes, path: str | PathLike[str] = CONFIG_NAME
) -> tuple[bytes, dict[str, Any] | None]:
    r"""Take ``quantization_config`` out; without one, the bytes are returned as they are.

    It is that of the whole model, else of a part such as ``text_config``.

    Examples
    --------
    >>> split(b'{"model_type": "llama", "quantization_config": {"bits": 4}}')
    (b'{\n  "model_type": "llama"\n}\n', {'bits': 4})
    """
    config = members(raw, path)
    places = list(_places(config))
    if not places:
        return raw, None
    found = [holder.pop(name) for holder, name in places]
    if not isinstance(found[0], dict):
        raise InputError(f"{places[0][1]} is not an object", path=path)
    return encode(config), found[0]


def quantization(config: dict[str, Any]) -> dict[str, Any] | None:
    """Return what a config says of quantization, for the model or for a part of it.

    Examples
    --------
    >>> quantization({"text_config": {"quantization_config": {"quant_method": "awq"}}})
    {'quant_method': 'awq'}
    """
    holder, name = next(_places(config), (config, _MEMBER))
    return holder[name] if isinstance(holder.get(name), dict) else None


def _places(config: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield where a config speaks of quantization: at the top, or in a composite model's part."""
    yield from ((config, name) for name in (_MEMBER, _FORMER) if name in config)
    if isinstance(config.get(_MLX), dict):
        yield config, _MLX
    for name, part in config.items():
        inside = name.endswith("_config") and name not in (_MEMBER, _FORMER)
        if inside and isinstance(part, dict) and isinstance(part.get(_MEMBER), dict):
            yield part, _MEMBER


def join(config: bytes, quantization: dict[str, Any]) -> bytes:
    """Return ``config.json`` with a ``quantization_config``, in its place if keys are sorted.

    Examples
    --------
    >>> join(b'{"a": 1, "z": 2}', {"bits": 4}).decode().split()
    ['{', '"a":', '1,', '"quantization_config":', '{', '"bits":', '4', '},', '"z":', '2', '}']
    """
    return encode(with_member(members(config), _MEMBER, quantization))


def with_member(fields: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """Return a config with another value of a member, in its place if keys are sorted."""
    changed = {**fields, key: value}
    return dict(sorted(changed.items())) if list(fields) == sorted(fields) else changed


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
    fields = members(config)
    named = [key for key in ("dtype", "torch_dtype") if key in fields]
    if all(fields[key] == dtype for key in named):
        return config
    fields.update(dict.fromkeys(named, dtype))
    return encode(fields)
