"""A shuffled order that is computed, not stored: which item stands at place i.

A Feistel network on the smallest even number of bits that holds n numbers is a bijection
whatever its round function; places that fall outside of n are sent through it again until
they fall inside (cycle walking), which keeps it a bijection. Integer arithmetic only, so
the order is the same on every machine, and any part of it can be had at once.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["Permutation"]

_ROUNDS = 6
_WORD = (1 << 64) - 1


def _mixed(x: int) -> int:
    """Return the finalizer of SplitMix64 (Steele, Lea, Flood 2014)."""
    x = (x + 0x9E3779B97F4A7C15) & _WORD
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _WORD
    return x ^ (x >> 31)


class Permutation:
    """A permutation of 0 … n - 1.

    Parameters
    ----------
    n : int
        At most 2⁶².
    *key : int
        Seed, epoch, purpose: another permutation for each.

    Examples
    --------
    >>> order = Permutation(5, 0)
    >>> sorted(order(np.arange(5)).tolist())
    [0, 1, 2, 3, 4]
    """

    def __init__(self, n: int, *key: int) -> None:
        self._n = n
        self._half = max(1, (max(n - 1, 1).bit_length() + 1) // 2)
        state = 0
        for number in key:
            state = _mixed(state ^ (number & _WORD))
        self._keys = [np.uint64(_mixed(state ^ turn)) for turn in range(_ROUNDS)]

    def __call__(self, places: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the items at these places.

        Parameters
        ----------
        places : numpy.ndarray
            int64, each from 0 to n - 1.

        Returns
        -------
        numpy.ndarray
            int64, of the same shape.
        """
        items = self._feistel(places.astype(np.uint64))
        while (outside := items >= np.uint64(self._n)).any():
            items[outside] = self._feistel(items[outside])
        return items.astype(np.int64)

    def _feistel(self, items: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        half, mask = np.uint64(self._half), np.uint64((1 << self._half) - 1)
        left, right = items >> half, items & mask
        for key in self._keys:
            left, right = right, left ^ (_mixed_array(right ^ key) & mask)
        return (left << half) | right


def _mixed_array(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
