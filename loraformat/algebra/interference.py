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
from typing import Any

import numpy
from numpy.typing import NDArray

__all__ = ["drop", "elect", "magnitude_threshold", "prune"]

_HALF = 16


def magnitude_threshold(tiles: Callable[[], Iterable[NDArray[Any]]], keep: int) -> float:
    """Return the magnitude of the keep-th largest element, without holding the matrix.

    A radix selection: non-negative floats are ordered as their bits are, so a histogram of the
    upper 16 bits and then one of the lower 16 find the element exactly in two passes: `tiles` is
    called twice, and yields float32 arrays.

    Examples
    --------
    >>> tiles = [numpy.float32([1, -4]), numpy.float32([3])]
    >>> magnitude_threshold(lambda: tiles, 2)
    3.0
    """
    upper, keep = _select((_bits(tile) >> _HALF for tile in tiles()), keep)
    lower, _ = _select(
        (bits[bits >> _HALF == upper] & 0xFFFF for bits in map(_bits, tiles())), keep
    )
    return float(numpy.int32(upper << _HALF | lower).view(numpy.float32))


def _bits(tile: NDArray[Any]) -> NDArray[Any]:
    return abs(tile).reshape(-1).view(numpy.int32)


def _select(digits: Iterable[NDArray[Any]], keep: int) -> tuple[int, int]:
    """Return the digit of the keep-th largest element, and its rank within that digit."""
    counts = numpy.zeros(1 << _HALF, numpy.int64)
    for digit in digits:
        counts += numpy.bincount(digit, minlength=1 << _HALF)
    above = numpy.cumsum(counts[::-1])[::-1]  # how many have this digit or a larger one
    chosen = int((above >= keep).sum()) - 1
    return chosen, keep - int(above[chosen] - counts[chosen])


def prune(delta: NDArray[Any], threshold: float) -> NDArray[Any]:
    """Return the delta with elements below a magnitude set to zero.

    Examples
    --------
    >>> prune(numpy.array([1.0, -4.0, 3.0]), 3.0)
    array([ 0., -4.,  3.])
    """
    return numpy.where(numpy.abs(delta) >= threshold, delta, 0.0)


def drop(delta: NDArray[Any], density: float, random: numpy.random.Generator) -> NDArray[Any]:
    """Keep each element with a probability, the density, and divide it by that: its mean stays.

    Examples
    --------
    >>> drop(numpy.ones(4), 1.0, numpy.random.default_rng())
    array([1., 1., 1., 1.])
    """
    kept = random.random(delta.shape, numpy.float32) < density
    return numpy.where(kept, delta / density, 0.0)


def elect(weighted: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Return the element-wise mean of the values with the sign of their sum (TIES).

    `weighted` are wᵢ Dᵢ, pruned or dropped; zeros do not vote.

    Examples
    --------
    >>> elect([numpy.array([2.0, -1.0]), numpy.array([4.0, 3.0]), numpy.array([-1.0, 0.0])])
    array([3., 3.])
    """
    stack = numpy.stack(weighted)
    agreeing = numpy.where(stack.sum(0) >= 0, stack > 0, stack < 0)
    means: NDArray[Any] = stack.sum(0, where=agreeing)
    means /= numpy.maximum(agreeing.sum(0, dtype=stack.dtype), 1)
    return means
