"""GGUF metadata keys: validated, decoded on access."""

from __future__ import annotations

import codecs
import struct
from dataclasses import dataclass

from loraformat.errors import UnsupportedError, printable
from loraformat_converters.gguf.container.cursor import Cursor
from loraformat_converters.gguf.container.types import ValueType
from loraformat_converters.gguf.container.values import GGUFValue

__all__ = ["ValueSpan", "read_keys"]

MAX_KEY_BYTES = 1024
MAX_STRING_BYTES = 64 << 20
MAX_ITEMS = 1 << 21  # of one array, and of all arrays of strings together
_CHUNK = 1 << 18
_U64 = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class ValueSpan:
    """Where a value lies in the head."""

    type: ValueType
    begin: int
    end: int
    item_type: ValueType | None = None
    count: int = 1

    def value(self, whole: memoryview) -> GGUFValue:
        """Return the value, a view on the bytes of the whole head."""
        return GGUFValue(self.type, whole[self.begin : self.end], self.item_type, self.count)


def read_keys(cursor: Cursor, count: int) -> dict[str, ValueSpan]:
    """Read that many keys, and leave the cursor behind them.

    Raises
    ------
    InputError
        If one is damaged, hostile or twice there.
    """
    spans: dict[str, ValueSpan] = {}
    strings = 0
    for number in range(count):
        key = cursor.name(MAX_KEY_BYTES, f"key {number}")
        if key in spans:
            raise cursor.fail(f"has the key {printable(key)} twice")
        span = spans[key] = _span(cursor, f"the value of {printable(key)}")
        strings += span.count if span.item_type is ValueType.STRING else 0
        if strings > MAX_ITEMS:
            raise cursor.fail(f"has more than {MAX_ITEMS} strings in its arrays")
    return spans


def _value_type(cursor: Cursor, what: str) -> ValueType:
    number = cursor.u32(what)
    if number > max(ValueType):
        raise cursor.fail(f"{what} is of type {number}, and GGUF has 0 to 12")
    return ValueType(number)


def _span(cursor: Cursor, what: str) -> ValueSpan:
    kind = _value_type(cursor, what)
    if kind is ValueType.ARRAY:
        return _array(cursor, what)
    if kind is ValueType.STRING:
        length = cursor.u64(what)
        if length > MAX_STRING_BYTES:
            raise cursor.fail(f"{what} claims {length} bytes, more than {MAX_STRING_BYTES}")
        begin, end = cursor.skip(length, what)
        _check_utf8(cursor, begin, end, what)
    else:
        begin, end = _numbers(cursor, kind, 1, what)
    return ValueSpan(kind, begin, end)


def _array(cursor: Cursor, what: str) -> ValueSpan:
    item = _value_type(cursor, what)
    if item is ValueType.ARRAY:
        raise UnsupportedError(
            f"{what} is an array of arrays, which no GGUF program reads", path=cursor.path
        )
    count = cursor.u64(what)
    if count > MAX_ITEMS:
        raise cursor.fail(f"{what} claims {count} items, more than {MAX_ITEMS}")
    if count * (item.nbytes or 8) > cursor.nbytes - cursor.at:
        raise cursor.fail(
            f"{what} claims {count} items, more than the rest of the file can hold",
            hint="download or copy it again",
        )
    if item is ValueType.STRING:
        begin, end = _strings(cursor, count, what)
    else:
        begin, end = _numbers(cursor, item, count, what)
    return ValueSpan(ValueType.ARRAY, begin, end, item, count)


def _strings(cursor: Cursor, count: int, what: str) -> tuple[int, int]:
    """Go over strings; what they hold is checked when they are looked at."""
    begin = at = cursor.at
    length_at, have = _U64.unpack_from, len(cursor.data)
    for _ in range(count):  # up to two million times: no calls where none is needed
        if at + 8 > have:
            cursor.need(at + 8, what)
            have = len(cursor.data)
        (length,) = length_at(cursor.data, at)
        at += 8 + length
        if at > have:
            cursor.need(at, what)
            have = len(cursor.data)
    cursor.at = at
    return begin, at


def _check_utf8(cursor: Cursor, begin: int, end: int, what: str) -> None:
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        for at in range(begin, end, _CHUNK):
            stop = min(at + _CHUNK, end)
            decoder.decode(bytes(cursor.data[at:stop]), stop == end)
    except UnicodeDecodeError as error:
        raise cursor.fail(f"{what} is not UTF-8 ({error.reason})") from None


def _numbers(cursor: Cursor, kind: ValueType, count: int, what: str) -> tuple[int, int]:
    """Go over numbers; truth values are checked."""
    begin, end = cursor.skip(count * kind.nbytes, what)
    strange = set(bytes(cursor.data[begin:end])) - {0, 1} if kind is ValueType.BOOL else ()
    if strange:
        raise cursor.fail(f"{what} is the truth value {min(strange)}, wanted 0 or 1")
    return begin, end
