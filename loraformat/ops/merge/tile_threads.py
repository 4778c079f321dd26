"""Working on the tiles of a matrix, on all CPUs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy

from loraformat.algebra.blas import one_blas_thread
from loraformat.algebra.row_tiles import row_tiles
from loraformat.nf4.kernels import threads

__all__ = ["TILE_ELEMENTS", "over_tiles"]

#: Elements of a tile: it and what is computed from it stay in the cache.
TILE_ELEMENTS = 1 << 16
Found = TypeVar("Found")


def over_tiles(
    work: Callable[[int, int], Found], rows: int, columns: int, elements: int = TILE_ELEMENTS
) -> list[Found]:
    """Work on tiles of whole rows, on all CPUs, each matrix product on one.

    Parameters
    ----------
    work : callable
        Gets the first row of a tile, and the one behind its last.
    rows, columns : int
    elements : int
        Of a tile.

    Returns
    -------
    list
        What ``work`` returned, in the order of the tiles.

    Examples
    --------
    >>> over_tiles(lambda start, stop: stop - start, 5, 10, 20)
    [2, 2, 1]
    """
    tiles = list(row_tiles(rows, columns, elements))
    found: dict[int, Found] = {}

    def task(start: int, stop: int) -> None:
        with numpy.errstate(all="ignore"):  # whoever asks looks at what is not finite
            found.update((number, work(*tiles[number])) for number in range(start, stop))

    with one_blas_thread():
        threads.run(task, len(tiles), 1)
    return [found[number] for number in range(len(tiles))]
