"""Element-wise combination of deltas: trimming, dropping, sign election (TIES, DARE).

These are heuristics on the *effective* deltas Dᵢ, which alone have a meaning: applied to
the factors A and B one by one they combine coordinates of different bases.

* *magnitude pruning*: keep the share of largest elements (TIES' first step).
* *TIES* (Yadav 2023): prune, elect the sign of Σ wᵢ Dᵢ per element, average what agrees.
* *DARE* (Yu 2023): drop elements at random, divide the others by the density.

Weights are applied before signs are elected, so a negative weight votes against.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

__all__ = ["drop", "elect", "magnitude_threshold", "prune"]

_HALF = 16


def magnitude_threshold(tiles: Callable[[], Iterable[torch.Tensor]], keep: int) -> float:
    """Return the magnitude of the keep-th largest element, without holding the matrix.

    A radix selection: non-negative floats are ordered as their bits are, so a histogram of
    the upper 16 bits and then one of the lower 16 find the element exactly in two passes.

    Parameters
    ----------
    tiles : callable
        Called twice; yields float32 tensors.
    keep : int
        At least 1, at most the number of elements.

    Examples
    --------
    >>> magnitude_threshold(lambda: [torch.tensor([1.0, -4.0]), torch.tensor([3.0])], 2)
    3.0
    """
    upper, keep = _select((_bits(tile) >> _HALF for tile in tiles()), keep)
    lower, _ = _select(
        (bits[bits >> _HALF == upper] & 0xFFFF for bits in map(_bits, tiles())), keep
    )
    return float(torch.tensor(upper << _HALF | lower, dtype=torch.int32).view(torch.float32))


def _bits(tile: torch.Tensor) -> torch.Tensor:
    return tile.abs().flatten().view(torch.int32)


def _select(digits: Iterable[torch.Tensor], keep: int) -> tuple[int, int]:
    """Return the digit of the keep-th largest, and its place among equals."""
    counts = torch.zeros(1 << _HALF, dtype=torch.int64)
    for digit in digits:
        counts += torch.bincount(digit, minlength=1 << _HALF)
    above = counts.flip(0).cumsum(0).flip(0)  # how many have this digit or a larger one
    chosen = int((above >= keep).sum()) - 1
    return chosen, keep - int(above[chosen] - counts[chosen])


def prune(delta: torch.Tensor, threshold: float) -> torch.Tensor:
    """Return the delta with elements below a magnitude set to zero.

    Examples
    --------
    >>> prune(torch.tensor([1.0, -4.0, 3.0]), 3.0)
    tensor([ 0., -4.,  3.])
    """
    return torch.where(delta.abs() >= threshold, delta, 0.0)


def drop(delta: torch.Tensor, density: float, random: torch.Generator) -> torch.Tensor:
    """Keep each element with a probability and divide it by that: its mean stays.

    Parameters
    ----------
    delta : torch.Tensor
    density : float
        In (0, 1].
    random : torch.Generator

    Examples
    --------
    >>> drop(torch.ones(4), 1.0, torch.Generator())
    tensor([1., 1., 1., 1.])
    """
    kept = torch.rand(delta.shape, generator=random) < density
    return torch.where(kept, delta / density, 0.0)


def elect(weighted: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return, per element, the mean of what has the sign of the sum.

    Parameters
    ----------
    weighted : sequence of torch.Tensor
        wᵢ Dᵢ, pruned or dropped; zeros do not vote.

    Examples
    --------
    >>> elect([torch.tensor([2.0, -1.0]), torch.tensor([4.0, 3.0]), torch.tensor([-1.0, 0.0])])
    tensor([3., 3.])
    """
    stack = torch.stack(list(weighted))
    positive = stack.sum(0) >= 0
    agreeing = torch.where(positive, stack > 0, stack < 0)
    return torch.where(agreeing, stack, 0.0).sum(0) / agreeing.sum(0).clamp(min=1)
