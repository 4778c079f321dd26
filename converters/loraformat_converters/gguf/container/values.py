"""GGUF metadata values in their stored bytes.

So a value costs nothing until it is looked at (a vocabulary has 256,000 strings), and one
that is copied from file to file is copied exactly.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

from loraformat.errors import InputError
from loraformat_converters.gguf.container.types import ValueType

__all__ = ["GGUFValue"]

_LENGTH = struct.Struct("<Q")


class GGUFValue:
    """A metadata value with its type.

    Parameters
    ----------
    type : ValueType
    raw : bytes-like
        Its bytes, little-endian: of a string without its length, of an array without type
        and count.
    item_type : ValueType, optional
        Of an array's items.
    count : int
        An array's items.

    Examples
    --------
    >>> GGUFValue.of(ValueType.UINT32, 7)
    GGUFValue(UINT32, 7)
    >>> GGUFValue.of_array(ValueType.STRING, ["a", "é"]).value
    ['a', 'é']
    """

    __slots__ = ("count", "item_type", "raw", "type")

    def __init__(
        self,
        type: ValueType,
        raw: bytes | memoryview,
        item_type: ValueType | None = None,
        count: int = 1,
    ) -> None:
        self.type, self.raw, self.item_type, self.count = type, memoryview(raw), item_type, count

    @classmethod
    def of(cls, type: ValueType, value: Any) -> GGUFValue:
        """Make a value of one number, truth value or text.

        Raises
        ------
        ValueError
            If it does not fit the type.
        """
        if type is ValueType.STRING:
            return cls(type, str(value).encode("utf-8"))
        return cls(type, _pack(type, [value]))

    @classmethod
    def of_array(cls, item_type: ValueType, items: Sequence[Any]) -> GGUFValue:
        """Make an array of numbers, truth values or texts.

        Raises
        ------
        ValueError
            If an item does not fit the type.
        """
        if item_type is ValueType.STRING:
            texts = [str(item).encode("utf-8") for item in items]
            raw = b"".join(part for text in texts for part in (_LENGTH.pack(len(text)), text))
        else:
            raw = _pack(item_type, items)
        return cls(ValueType.ARRAY, raw, item_type, len(items))

    @classmethod
    def text(cls, value: str) -> GGUFValue:
        """Make a STRING."""
        return cls.of(ValueType.STRING, value)

    @classmethod
    def texts(cls, values: Sequence[str]) -> GGUFValue:
        """Make an array of STRING."""
        return cls.of_array(ValueType.STRING, values)

    @classmethod
    def uint(cls, value: int) -> GGUFValue:
        """Make a UINT32."""
        return cls.of(ValueType.UINT32, value)

    @classmethod
    def flag(cls, value: bool) -> GGUFValue:
        """Make a BOOL."""
        return cls.of(ValueType.BOOL, value)

    @property
    def value(self) -> Any:
        """Decode: an int, float, bool, str, or a list of them.

        Raises
        ------
        InputError
            If a text is not UTF-8.
        """
        if self.type is ValueType.STRING:
            return _text(bytes(self.raw))
        if self.type is not ValueType.ARRAY:
            return struct.unpack(f"<{self.type.struct}", self.raw)[0]
        if self.item_type is ValueType.STRING:
            return self._strings()
        assert self.item_type is not None
        return list(struct.unpack(f"<{self.count}{self.item_type.struct}", self.raw))

    def _strings(self) -> list[str]:
        raw, at, found, length_at = bytes(self.raw), 0, [], _LENGTH.unpack_from
        for _ in range(self.count):
            (length,) = length_at(raw, at)
            at += 8 + length
            found.append(_text(raw[at - length : at]))
        return found

    @property
    def described(self) -> str:
        """What it is, for a message: ``a UINT32``, ``an array of 3 STRING``."""
        if self.item_type is not None:
            return f"an array of {self.count} {self.item_type.name}"
        return f"a {self.type.name}"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, GGUFValue):
            return NotImplemented
        return (self.type, self.item_type, self.count, self.raw) == (
            other.type, other.item_type, other.count, other.raw
        )  # fmt: skip

    def __hash__(self) -> int:
        return hash((self.type, self.item_type, self.count, bytes(self.raw)))

    def __repr__(self) -> str:
        if self.type is ValueType.ARRAY:
            return f"GGUFValue({self.described})"
        return f"GGUFValue({self.type.name}, {self.value!r})"


def _pack(type: ValueType, items: Sequence[Any]) -> bytes:
    if type.struct == "?" and not all(isinstance(item, bool) for item in items):
        raise ValueError("a BOOL wants True or False")
    try:
        return struct.pack(f"<{len(items)}{type.struct}", *items)
    except (struct.error, OverflowError) as error:
        raise ValueError(f"does not fit {type.name}: {error}") from None


def _text(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"holds text that is not UTF-8 ({error.reason})") from None
