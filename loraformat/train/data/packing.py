"""Which samples share a row: best fit, longest first, or one after the other."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator

__all__ = ["best_fit", "next_fit"]


def best_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """Pack by best-fit decreasing: each sample, longest first, goes where least is left over.

    Never more than 11/9 of the fewest possible rows, and one (Johnson 1973); on samples
    of mixed lengths next to nothing is left over.

    Parameters
    ----------
    lengths : list of int
        Tokens of each sample, at most ``capacity``.
    capacity : int
        Tokens of a row.

    Returns
    -------
    list of list of int
        Positions in ``lengths``; equal lengths in their order, so that the result is
        the same everywhere.

    Examples
    --------
    >>> best_fit([3, 5, 4, 2], 8)
    [[1, 0], [2, 3]]
    """
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # sorted: (tokens left, row)
    for position in sorted(range(len(lengths)), key=lambda position: -lengths[position]):
        length = lengths[position]
        place = bisect_left(free, (length, -1))
        if place < len(free):
            left, row = free.pop(place)
        else:
            left, row = capacity, len(rows)
            rows.append([])
        rows[row].append(position)
        insort(free, (left - length, row))
    return rows


def next_fit(lengths: Iterable[tuple[int, int]], capacity: int) -> Iterator[tuple[int, ...]]:
    """Pack in order: a row ends where the next sample does not fit.

    Parameters
    ----------
    lengths : iterable of (int, int)
        Samples and their tokens.
    capacity : int
        Tokens of a row.

    Examples
    --------
    >>> list(next_fit([(0, 3), (1, 5), (2, 4)], 8))
    [(0, 1), (2,)]
    """
    row: list[int] = []
    used = 0
    for sample, length in lengths:
        if row and used + length > capacity:
            yield tuple(row)
            row, used = [], 0
        row.append(sample)
        used += length
    if row:
        yield tuple(row)
