"""Lookup tables of the kernels, derived from `loraformat.nf4.tables`."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy

from loraformat.nf4.tables import LEVEL_BITS, NESTED_MAP_BITS
from loraformat.tensors.arrays import Array

__all__ = ["from_bits", "tables"]


def from_bits(bits: tuple[int, ...]) -> Array:
    """Return float32 numbers of these bit patterns."""
    return numpy.array(bits, numpy.uint32).view(numpy.float32)


#: ``nf4_tables`` of nf4.h: the two code tables, and what they are searched by.
_LAYOUT = numpy.dtype(
    [
        ("levels", "f4", 16),
        # [-1, 1] in 32 equal bins, none of which holds two thresholds: that inside the bin (+inf if
        # none), and the number of those below it.
        ("bin_threshold", "f4", 32),
        ("bin_code", "i4", 32),
        ("thresholds", "f4", 16),  # midpoints of neighbouring levels, rounded to float32, then +inf
        ("nested_map", "f4", 256),
        ("nested_bounds", "f4", 256),  # of neighbouring entries, likewise
        # By the 15 leading bits of a float32: the number of bounds below every float that shares
        # them. No such interval holds two bounds.
        ("nested_base", "u1", 32768),
    ]
)


def _midpoints(values: Array) -> Array:
    middles = (values[:-1] + values[1:]) / numpy.float32(2)
    return numpy.append(middles, numpy.float32(numpy.inf))


def _bins(thresholds: Array) -> tuple[Array, Array]:
    below = numpy.searchsorted(thresholds.astype(numpy.float64), numpy.arange(33) / 15.5 - 1.0)
    inside, first = below[1:] > below[:-1], below[:-1]
    threshold = numpy.where(inside, thresholds[first.clip(max=15)], numpy.float32(numpy.inf))
    return threshold, first.astype(numpy.int32)


def _leading_bits(bounds: Array) -> Array:
    key = numpy.arange(1 << 15, dtype=numpy.uint32)
    # The least float of a negative interval is the one whose trailing bits are all ones.
    least = (key << 17) | numpy.where(key >= 1 << 14, (1 << 17) - 1, 0).astype(numpy.uint32)
    floats = least.view(numpy.float32)
    floats = numpy.where(numpy.isnan(floats), numpy.float32(0), floats)
    return numpy.searchsorted(bounds, floats).clip(max=255).astype(numpy.uint8)


@cache
def tables() -> Any:
    """Return the tables as a record array of `_LAYOUT`, which C and numpy share: read-only."""
    made = numpy.zeros((), _LAYOUT).view(numpy.recarray)
    made.levels, made.nested_map = from_bits(LEVEL_BITS), from_bits(NESTED_MAP_BITS)
    made.thresholds, made.nested_bounds = _midpoints(made.levels), _midpoints(made.nested_map)
    made.bin_threshold, made.bin_code = _bins(made.thresholds)
    made.nested_base = _leading_bits(made.nested_bounds)
    made.flags.writeable = False
    return made
