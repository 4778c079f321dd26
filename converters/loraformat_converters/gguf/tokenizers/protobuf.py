"""A minimal reader of the protocol buffer wire format.

https://protobuf.dev/programming-guides/encoding/: a message is a row of fields, each a key
(number << 3 | wire type, a varint) and a value. Nothing is allocated by what a field claims.
"""

from __future__ import annotations

from collections.abc import Iterator

__all__ = ["WireError", "fields"]

_VARINT, _I64, _LEN, _I32 = 0, 1, 2, 5


class WireError(ValueError):
    """The bytes are no message."""


def fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    r"""Go over the fields of a message.

    Parameters
    ----------
    data : memoryview
        Of bytes.

    Yields
    ------
    tuple of int and (int or memoryview)
        The field's number and its value: varints as unsigned integers of 64 bits, all others
        as their bytes.

    Raises
    ------
    WireError
        If a field is cut off, or of a type that does not exist.

    Examples
    --------
    >>> [(n, v if isinstance(v, int) else bytes(v)) for n, v in fields(
    ...     memoryview(b"\x08\x96\x01\x12\x02hi"))]
    [(1, 150), (2, b'hi')]
    """
    at, end = 0, len(data)
    while at < end:
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if not 1 <= number < 1 << 29:
            raise WireError(f"has the field number {number} at byte {at}")
        if wire == _VARINT:
            value, at = _varint(data, at)
            yield number, value
            continue
        if wire == _LEN:
            size, at = _varint(data, at)
        elif wire in (_I64, _I32):
            size = 8 if wire == _I64 else 4
        else:
            raise WireError(f"has the wire type {wire} at byte {at}")
        if size > end - at:
            raise WireError(f"claims {size} bytes at byte {at}, and {end - at} are left")
        yield number, data[at : at + size]
        at += size


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise WireError("ends inside a number")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if value >= 1 << 64:
                break
            return value, at
    raise WireError(f"has a number of more than 64 bits before byte {at}")
