"""Lookup tables of the kernels, derived from `loraformat.nf4.tables`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from loraformat.nf4.tables import LEVEL_BITS, NESTED_MAP_BITS

__all__ = ["Tables", "from_bits", "tables"]


def from_bits(bits: tuple[int, ...]) -> Tensor:
    """Turn float32 bit patterns into numbers.

    Parameters
    ----------
    bits : tuple of int
        Unsigned 32-bit patterns.

    Returns
    -------
    Tensor
        float32, one element per pattern.
    """
    signed = [b - (1 << 32) if b >> 31 else b for b in bits]
    return torch.tensor(signed, dtype=torch.int32, device="cpu").view(torch.float32)


@dataclass(frozen=True, eq=False)
class Tables:
    """The two tables and what the searches through them need (all one-dimensional).

    Attributes
    ----------
    levels : Tensor
        float32[16].
    thresholds : Tensor
        float32[16]: midpoints of neighbouring levels, rounded to float32, then +inf.
    bin_threshold, bin_code : Tensor
        float32[32] and int32[32]: [-1, 1] in 32 equal bins; the threshold inside the bin (+inf if
        none) and the number of thresholds below it. No bin holds two.
    nested_map : Tensor
        float32[256].
    nested_bounds : Tensor
        float32[256]: midpoints of neighbouring entries, rounded to float32, then +inf.
    nested_base : Tensor
        uint8[32768]: indexed by the 15 leading bits of a float32, the number of bounds below every
        float that shares them. No such interval holds two bounds.
    """

    levels: Tensor
    thresholds: Tensor
    bin_threshold: Tensor
    bin_code: Tensor
    nested_map: Tensor
    nested_bounds: Tensor
    nested_base: Tensor


def _midpoints(values: Tensor) -> Tensor:
    return torch.cat([(values[:-1] + values[1:]) / 2, values.new_tensor([torch.inf])])


def _bins(thresholds: Tensor) -> tuple[Tensor, Tensor]:
    edges = torch.arange(33, dtype=torch.float64, device="cpu") / 15.5 - 1.0
    below = torch.searchsorted(thresholds.double(), edges)
    inside = below[1:] > below[:-1]
    threshold = torch.where(inside, thresholds[below[:-1].clamp(max=15)], torch.inf)
    return threshold, below[:-1].to(torch.int32)


def _leading_bits(bounds: Tensor) -> Tensor:
    key = torch.arange(1 << 15, dtype=torch.int64, device="cpu")
    # The least float of a negative interval is the one whose trailing bits are all ones.
    least = (key << 17) | torch.where(key >= 1 << 14, (1 << 17) - 1, 0)
    values = torch.where(least >= 1 << 31, least - (1 << 32), least).to(torch.int32)
    floats = values.view(torch.float32).nan_to_num(nan=0.0)
    return torch.searchsorted(bounds, floats).clamp(max=255).to(torch.uint8)


@cache
def tables() -> Tables:
    """Make the tables, once.

    Returns
    -------
    Tables
        Shared: treat every tensor in it as read-only.
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
