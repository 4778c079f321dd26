"""Least-squares scales for Q4_0 to Q5_1.

ggml's plain encoder takes the scale from the largest number of a block. Two grids that do not
fit together then err the same way in every block: the sixteen levels of NF4, rounded to the
eighths of Q4_0, come out too high by 0.38 of the error's own RMS, and a constant on every weight
adds up over the layers (docs/gguf.md has figures). Here several scales are tried for each
block, each with the codes that it leads to, and the one with the smallest squared error is
taken, after it was fitted to its codes: the bytes have the same layout, any reader reads them,
and the error is smaller from every source.

Blocks lie in columns: numbers that belong together are then added by whole rows, in an order of
our own, so that every machine finds the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["offset_codes", "signed_codes"]

_LARGEST_F16 = 65504.0


def signed_codes(
    blocks: torch.Tensor, levels: int, stretches: tuple[float, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find d and codes q for x ≈ d (q − levels/2).

    Parameters
    ----------
    blocks : torch.Tensor
        float32, ``[numbers, blocks]``; finite, and within float16.
    levels : int
        16 or 32; q runs from 0 to levels − 1.
    stretches : tuple of float
        To try: how many times levels/2 the largest number of a block lies from zero. With
        1, the first, the others can only make it better.

    Returns
    -------
    scales, codes : torch.Tensor
        float16, ``[blocks]``; uint8, in the shape of ``blocks``.

    Examples
    --------
    >>> import torch
    >>> scales, codes = signed_codes(torch.tensor([[-4.0], [3.5]]), 16, (1.0,))
    >>> scales.tolist(), codes.flatten().tolist()
    ([0.5], [0, 15])
    """
    import torch

    half = levels // 2
    low, high = _folded(torch.minimum, blocks), _folded(torch.maximum, blocks)
    extreme = torch.where(low + high > 0, high, low)  # the grid reaches a step further on its side
    count, total = len(blocks), _sum(blocks)
    best = scale = torch.full_like(low, -1)
    for stretch in stretches:
        whole = (blocks * _divided(-half * stretch, extreme)).round_().clamp_(-half, half - 1)
        codes = _sum(whole)
        squares = _sum(whole * whole) + codes * codes / count
        product = _sum(whole.mul_(blocks)) + codes * total / count
        fitted = torch.where(squares > 0, product / squares, 0)
        gain = product * fitted  # what the error is less than that of a scale of zero
        better = gain > best
        best, scale = torch.where(better, gain, best), torch.where(better, fitted, scale)
    stored = scale.to(torch.float16)
    whole = blocks * _divided(1.0, stored.float())
    return stored, whole.round_().clamp_(-half, half - 1).add_(half).to(torch.uint8)


def offset_codes(
    blocks: torch.Tensor, levels: int, shares: tuple[float, ...]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Find d, m and codes q for x ≈ d q + m.

    Parameters
    ----------
    blocks, levels
        As `signed_codes` takes them.
    shares : tuple of float
        To try: the share of the range of a block that the grid covers at first; it is fitted
        to its codes twice. With 1, the first, the others can only make it better.

    Returns
    -------
    scales, minima, codes : torch.Tensor
        float16, ``[blocks]``, twice; uint8, in the shape of ``blocks``.
    """
    import torch

    low, high = _folded(torch.minimum, blocks), _folded(torch.maximum, blocks)
    middle = (low + high) / 2
    centred = blocks - middle  # so that sums of squares say something of the error
    spread, total = (high - low) / 2, _sum(centred)
    best = scale = minimum = torch.full_like(low, -1)
    for share in shares:
        step, start = spread * (2 * share / (levels - 1)), spread * -share
        for _ in range(2):
            step, start, gain = _fitted(centred, total, step, start, levels)
        better = gain > best
        best = torch.where(better, gain, best)
        scale = torch.where(better, step, scale)
        minimum = torch.where(better, start, minimum)
    stored = scale.to(torch.float16)
    base = (minimum + middle).clamp_(-_LARGEST_F16, _LARGEST_F16).to(torch.float16)
    codes = (blocks - base.float()).mul_(_divided(1.0, stored.float()))
    return stored, base, codes.round_().clamp_(0, levels - 1).to(torch.uint8)


def _fitted(
    centred: torch.Tensor,
    total: torch.Tensor,
    step: torch.Tensor,
    start: torch.Tensor,
    levels: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Round to a grid, and return the line through the codes, and what it explains of squares."""
    import torch

    count = len(centred)
    whole = (centred - start).mul_(_divided(1.0, step)).round_().clamp_(0, levels - 1)
    codes, squares = _sum(whole), _sum(whole * whole)
    product = _sum(whole.mul_(centred))
    variance = count * squares - codes * codes
    slope = torch.where(variance > 0, (count * product - total * codes) / variance, 0)
    offset = (total - slope * codes) / count
    return slope, offset, slope * product + offset * total


def _divided(number: float, by: torch.Tensor) -> torch.Tensor:
    """Return number / by, and 0 where that is beyond float32: such a block is all but zero."""
    import torch

    quotient = number / by
    return torch.where(quotient.isfinite(), quotient, 0)


def _sum(numbers: torch.Tensor) -> torch.Tensor:
    """Add the rows of each column."""
    import torch

    return _folded(torch.add, numbers)


def _folded(
    operation: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], numbers: torch.Tensor
) -> torch.Tensor:
    """Put the rows together, whose count is a power of two, by halves."""
    while len(numbers) > 1:
        half = len(numbers) // 2
        numbers = operation(numbers[:half], numbers[half:])
    return numbers[0]
