"""Row tiles of a matrix."""

from __future__ import annotations

from collections.abc import Iterator

__all__ = ["row_tiles"]


def row_tiles(
    rows: int, columns: int, elements: int, *, least: int = 1
) -> Iterator[tuple[int, int]]:
    """Yield ranges (start, stop) of rows, of at most so many elements but at least `least` rows.

    Examples
    --------
    >>> list(row_tiles(5, 10, 20)), list(row_tiles(2, 100, 20))
    ([(0, 2), (2, 4), (4, 5)], [(0, 1), (1, 2)])
    """
    step = max(least, elements // max(columns, 1))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)
