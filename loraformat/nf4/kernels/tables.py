"""Lookup tables of the kernels, derived from `loraformat.nf4.tables`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy

from loraformat.nf4.tables import LEVEL_BITS, NESTED_MAP_BITS
from loraformat.tensors.arrays import Array

__all__ = ["Tables", "from_bits", "tables"]


def from_bits(bits: tuple[int, ...]) -> Array:
    """Turn float32 bit patterns into numbers.

    Parameters
    ----------
    bits : tuple of int
        Unsigned 32-bit patterns.

    Returns
    -------
    array
        float32, one element per pattern.
    """
    return numpy.array(bits, numpy.uint32).view(numpy.float32)


@dataclass(frozen=True, eq=False)
class Tables:
    """The two code tables and their search tables (all one-dimensional).

    Attributes
    ----------
    levels : Array
        float32[16].
    thresholds : Array
        float32[16]: midpoints of neighbouring levels, rounded to float32, then +inf.
    bin_threshold, bin_code : Array
        float32[32] and int32[32]: [-1, 1] in 32 equal bins; the threshold inside the bin (+inf if
        none) and the number of thresholds below it. No bin holds two.
    nested_map : Array
        float32[256].
    nested_bounds : Array
        float32[256]: midpoints of neighbouring entries, rounded to float32, then +inf.
    nested_base : Array
        uint8[32768]: indexed by the 15 leading bits of a float32, the number of bounds below every
        float that shares them. No such interval holds two bounds.
    """

    levels: Array
    thresholds: Array
    bin_threshold: Array
    bin_code: Array
    nested_map: Array
    nested_bounds: Array
    nested_base: Array


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
def tables() -> Tables:
    """Return the tables, built once.

    Returns
    -------
    Tables
        Shared: treat every array in it as read-only.
    """
    levels, nested_map = from_bits(LEVEL_BITS), from_bits(NESTED_MAP_BITS)
    thresholds, bounds = _midpoints(levels), _midpoints(nested_map)
    bin_threshold, bin_code = _bins(thresholds)
    return Tables(
        levels=levels,
        thresholds=thresholds,
        bin_threshold=bin_threshold,
        bin_code=bin_code,
        nested_map=nested_map,
        nested_bounds=bounds,
        nested_base=_leading_bits(bounds),
    )
