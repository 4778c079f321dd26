"""Strict JSON parsing.

Python's own parser keeps the last of two equal keys, accepts ``NaN``, and can be
made to recurse or to build numbers of any length. Files that two programs read
differently are how a checked file and a loaded file come to differ, so all of
that is refused here. Files that belong to other programs are read by
`loraformat.storage.foreign_json`.
"""

from __future__ import annotations

import json
import re
from typing import Any

__all__ = ["MAX_DEPTH", "StrictJsonError", "check_depth", "check_surrogates", "loads"]

#: Deepest nesting of objects and arrays that is read.
MAX_DEPTH = 32

_LONGEST_INTEGER = 20
_STRING = re.compile(rb'"[^"]*"?')
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_BRACKETS_AT_ONCE = 1 << 20
_OPENS = 0b10  # the bit that tells [ from ], and { from }
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class StrictJsonError(ValueError):
    """Raised for text that is not JSON, or that parsers may read differently."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise StrictJsonError(f"key {twice[:80]!a} occurs twice in one object")
    return result


def _constant(word: str) -> Any:
    raise StrictJsonError(f"{word} is not JSON")


def _integer(digits: str) -> int:
    if len(digits) > _LONGEST_INTEGER:
        raise StrictJsonError(f"integer of {len(digits)} digits")
    return int(digits)


def _float(digits: str) -> float:
    value = float(digits)
    if value in (float("inf"), float("-inf")):
        raise StrictJsonError(f"number {digits[:40]} is beyond float64")
    return value


def check_depth(data: bytes, most: int) -> None:
    """Refuse JSON nested deeper than so many levels (``[]`` is one), before it is parsed."""
    # Only a text with many brackets can be deep; this keeps the parser's recursion bounded.
    if data.count(b"[") + data.count(b"{") <= most:
        return
    import numpy as np

    # Every step is linear: what a stranger writes must not decide how long the check takes.
    unescaped = data.replace(b"\\\\", b"").replace(b'\\"', b"")
    brackets = _STRING.sub(b"", unescaped).translate(None, _NOT_BRACKETS)
    depth = 0
    for start in range(0, len(brackets), _BRACKETS_AT_ONCE):
        part = np.frombuffer(brackets[start : start + _BRACKETS_AT_ONCE], np.uint8)
        depths = depth + np.cumsum(np.where(part & _OPENS, 1, -1))
        if depths.max() > most:
            raise StrictJsonError(f"nested deeper than {most} levels")
        depth = int(depths[-1])


def loads(data: bytes) -> Any:
    """Parse UTF-8 JSON strictly.

    Parameters
    ----------
    data : bytes
        The whole text. The caller bounds its length.

    Returns
    -------
    object
        As ``json.loads`` would, objects in their written order.

    Raises
    ------
    StrictJsonError
        For invalid UTF-8, a duplicate key, ``NaN`` or ``Infinity``, an integer of
        more than 20 digits, nesting beyond 32, an unpaired surrogate, or anything
        that is not JSON.

    Examples
    --------
    >>> loads(b'{"rank": 16}')
    {'rank': 16}
    >>> loads(b'{"rank": 16, "rank": 8}')
    Traceback (most recent call last):
    loraformat.storage.strict_json.StrictJsonError: key 'rank' occurs twice in one object
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise StrictJsonError(f"not UTF-8 at byte {error.start}") from None
    check_depth(data, MAX_DEPTH)
    try:
        value = json.loads(
            text,
            object_pairs_hook=_object,
            parse_constant=_constant,
            parse_int=_integer,
            parse_float=_float,
        )
    except json.JSONDecodeError as error:
        raise StrictJsonError(f"not JSON: {error.msg} at character {error.pos}") from None
    check_surrogates(text, value)
    return value


def check_surrogates(text: str, value: Any) -> None:
    """Refuse an unpaired surrogate escape in JSON, given what it was parsed to."""
    if not _SURROGATE.search(text):
        return
    # "\ud800" is legal JSON but no text: it cannot be printed, stored or used as a file name.
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise StrictJsonError("an unpaired surrogate escape") from None
