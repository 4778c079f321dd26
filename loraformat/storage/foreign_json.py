"""Lenient parsing of other programs' JSON files.

transformers, PEFT and huggingface_hub parse with Python's ``json``: ``NaN`` and ``Infinity`` are
numbers, integers are of any length (transformers writes ``model_max_length`` with 31 digits), and
the last of two equal keys counts. What they open must open here, so only size and depth have
bounds. Files that the format itself defines are read by `loraformat.storage.strict_json`.
"""

from __future__ import annotations

import json
import sys
from os import PathLike
from typing import Any, TypeGuard

from loraformat.errors import InputError
from loraformat.storage.strict_json import StrictJsonError, check_depth, check_surrogates

__all__ = ["MAX_DEPTH", "ForeignJsonError", "is_finite", "loads", "parse_object"]

#: Deepest nesting that is read: that of serde_json, with which tokenizers parses.
MAX_DEPTH = 128
#: Python's own limit; the time of a conversion grows with the square of the length.
_LONGEST_INTEGER = 4300


class ForeignJsonError(ValueError):
    """Raised for text that Python's JSON parser cannot read."""


def _integer(digits: str) -> int:
    if len(digits) > _LONGEST_INTEGER:
        raise ForeignJsonError(f"an integer of {len(digits)} digits")
    return int(digits)


def loads(data: bytes) -> Any:
    """Parse UTF-8 JSON, whose length the caller has bounded, as Python's ``json`` does.

    Raises `ForeignJsonError` for invalid UTF-8, an integer of more than 4300 characters, nesting
    beyond 128, an unpaired surrogate (which is no text), or anything that is not JSON.

    Examples
    --------
    >>> loads(b'{"limits": [0.0, Infinity], "r": 8, "r": 16}')
    {'limits': [0.0, inf], 'r': 16}
    >>> loads(b'{"r": }')
    Traceback (most recent call last):
    loraformat.storage.foreign_json.ForeignJsonError: Expecting value at character 6
    """
    try:
        text = data.decode("utf-8")
        check_depth(data, MAX_DEPTH)
        value = json.loads(text, parse_int=_integer)
        check_surrogates(text, value)
    except UnicodeDecodeError as error:
        raise ForeignJsonError(f"not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise ForeignJsonError(f"{error.msg} at character {error.pos}") from None
    except StrictJsonError as error:
        raise ForeignJsonError(str(error)) from None
    return value


def parse_object(data: bytes, path: str | PathLike[str]) -> dict[str, Any]:
    """Parse a file that holds one JSON object; its path is for messages.

    Raises `InputError` if it is not JSON, or not an object.

    Examples
    --------
    >>> parse_object(b"[]", "config.json")
    Traceback (most recent call last):
    loraformat.errors.InputError: config.json: not a JSON object
    """
    try:
        value = loads(data)
    except ForeignJsonError as error:
        raise InputError(f"not JSON: {error}", path=path) from None
    if not isinstance(value, dict):
        raise InputError("not a JSON object", path=path)
    return value


def is_finite(value: object) -> TypeGuard[int | float]:
    """Tell whether a value is a number within the range of a float.

    Examples
    --------
    >>> [is_finite(value) for value in (8, 0.5, True, "8", float("nan"), 10**400)]
    [True, True, False, False, False, False]
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= sys.float_info.max
