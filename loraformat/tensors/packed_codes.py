"""Codes of a few bits each, several to a byte or word, as numbers.

Code i of a row occupies the bits from i * bits on, counted from the lowest bit of the first
little-endian word. It may continue in the next word: 32 codes of three bits fill three words.
"""

from __future__ import annotations

import numpy

from loraformat.tensors.arrays import Array

__all__ = ["e2m1", "unpack"]

#: E2M1 by code, the sign in the highest bit (OCP Microscaling Formats 1.0, section 5.3.3).
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_BYTES = numpy.arange(256)[:, None]
#: The numbers of each byte, by bits: (256, 8 / bits).
_TABLES = {
    bits: (_BYTES >> numpy.arange(0, 8, bits) & (1 << bits) - 1).astype(numpy.float32)
    for bits in (1, 2, 4, 8)
}
_E2M1_PAIRS = numpy.array(_E2M1, numpy.float32)[_TABLES[4].astype(numpy.uint8)]


def unpack(words: Array, bits: int, start: int, stop: int) -> Array:
    """Return codes as unsigned numbers.

    Parameters
    ----------
    words : array
        Integers of any size, (..., words of a row).
    bits : int
        Of a code, 1 to 8.
    start, stop : int
        Of the codes of a row.

    Returns
    -------
    array
        float32, (..., stop - start).

    Examples
    --------
    >>> unpack(numpy.array([[0x76543210]], numpy.int32), 4, 1, 5)
    array([[1., 2., 3., 4.]], dtype=float32)
    >>> unpack(numpy.array([0b10_001_000, 0b1], numpy.uint8), 3, 0, 3)
    array([0., 1., 6.], dtype=float32)
    """
    data = numpy.ascontiguousarray(words).view(numpy.uint8)
    if bits in _TABLES:
        each = 8 // bits
        first = start // each
        found = _joined(_TABLES[bits].take(data[..., first : -(-stop // each)], axis=0))
        return found[..., start - first * each : stop - first * each]
    low = numpy.arange(start, stop) * bits
    data = numpy.pad(data, [(0, 0)] * (data.ndim - 1) + [(0, 1)]).astype(numpy.uint16)
    both = data[..., low >> 3] | data[..., (low >> 3) + 1] << numpy.uint16(8)
    return (both >> (low & 7).astype(numpy.uint16) & (1 << bits) - 1).astype(numpy.float32)


def e2m1(codes: Array) -> Array:
    """Return the numbers of E2M1 codes, two in a byte, the first in the low nibble.

    Parameters
    ----------
    codes : array
        uint8, (..., n).

    Returns
    -------
    array
        float32, (..., 2 n).

    Examples
    --------
    >>> e2m1(numpy.array([0xF1], numpy.uint8))
    array([ 0.5, -6. ], dtype=float32)
    """
    return _joined(_E2M1_PAIRS.take(codes, axis=0))


def _joined(values: Array) -> Array:
    """Return the numbers of all bytes of a row in one dimension."""
    return values.reshape(*values.shape[:-2], values.shape[-2] * values.shape[-1])
