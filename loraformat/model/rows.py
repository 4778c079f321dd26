"""A tensor as rows of a matrix, some of which are computed without the others.

All dimensions but the last make rows, so that a stack of experts (experts, out, in) is a matrix of
experts * out rows; a vector is one row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Any, TypeAlias

import numpy

from loraformat.nf4.kernels.cast import cast
from loraformat.nf4.kernels.threads import run
from loraformat.tensors.arrays import Array, array_bytes, numpy_dtype
from loraformat.tensors.dtypes import ITEM_BYTES

__all__ = ["Elements", "RowReader", "RowSource", "matrix_shape"]

#: Of (start, stop): returns these rows, (stop - start, columns).
RowReader: TypeAlias = Callable[[int, int], Array]

#: Elements of the tiles in which rows are computed.
_TILE_ELEMENTS = 1 << 18
_CHUNK_BYTES = 8 << 20


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return rows and columns of the matrix that a tensor is.

    Examples
    --------
    >>> matrix_shape((8, 64, 32)), matrix_shape((5,)), matrix_shape(())
    ((512, 32), (1, 5), (1, 1))
    """
    return prod(shape[:-1]), shape[-1] if shape else 1


@dataclass(frozen=True, slots=True)
class RowSource:
    """Computes a tensor by rows; as a `DenseTensor`'s ``load`` it computes all of them.

    Attributes
    ----------
    dtype : str
        safetensors name, F32, F16 or BF16.
    shape : tuple of int
    open : callable
        Returns the reader of rows, in any dtype; several threads may call that. What it needs
        for all of them, such as decoded scales, is made once, here.
    step : int
        Rows that are best computed together.
    """

    dtype: str
    shape: tuple[int, ...]
    open: Callable[[], RowReader]
    step: int = 32

    def reader(self) -> RowReader:
        """Return a reader whose numbers are rounded to the dtype, once, to nearest even."""
        read, dtype = self.open(), numpy_dtype(self.dtype)

        def rounded(start: int, stop: int) -> Array:
            with numpy.errstate(all="ignore"):  # what is too large becomes infinite
                values = read(start, stop)
            if values.dtype == dtype:
                return values
            result = numpy.empty(values.shape, dtype)
            cast(values, result)
            return result

        return rounded

    def __call__(self) -> memoryview:
        """Compute all rows, in tiles, with every CPU of the process."""
        return self._computed(self.open(), 0, matrix_shape(self.shape)[0])

    def chunks(self) -> Iterator[memoryview]:
        """Compute the tensor's bytes, one after the other: a few megabytes at once."""
        rows, read = matrix_shape(self.shape)[0], self.open()
        height = self._height(_CHUNK_BYTES // ITEM_BYTES[self.dtype])
        for start in range(0, max(rows, 1), height):  # of no rows, no bytes
            yield self._computed(read, start, min(start + height, rows))

    def _computed(self, read: RowReader, first: int, last: int) -> memoryview:
        columns = matrix_shape(self.shape)[1]
        result = numpy.empty((last - first, columns), numpy_dtype(self.dtype))

        def tile(start: int, stop: int) -> None:
            with numpy.errstate(all="ignore"):
                values = read(first + start, first + stop)
            cast(values, result[start:stop])

        run(tile, last - first, self._height(_TILE_ELEMENTS))
        return array_bytes(result)

    def _height(self, elements: int) -> int:
        """Return how many rows, a multiple of the step, have about so many elements."""
        columns = max(matrix_shape(self.shape)[1], 1)
        return max(elements // columns // self.step, 1) * self.step


@dataclass(frozen=True, slots=True)
class Elements:
    """The elements of a tensor in row-major order, which slices of it compute.

    Attributes
    ----------
    read : callable
        Returns rows.
    columns, size : int
    dtype : numpy.dtype
    first : int
        Element of the matrix with which they begin.

    Examples
    --------
    >>> matrix = numpy.arange(6).reshape(2, 3)
    >>> Elements(lambda a, b: matrix[a:b], 3, 6, matrix.dtype)[2:5]
    array([2, 3, 4])
    """

    read: RowReader
    columns: int
    size: int
    dtype: numpy.dtype[Any]
    first: int = 0

    def __getitem__(self, piece: slice) -> Array:
        start, stop, _ = piece.indices(self.size)
        start, stop = self.first + start, self.first + stop
        row = start // max(self.columns, 1)
        rows = self.read(row, -(-stop // max(self.columns, 1))).reshape(-1)
        return rows[start - row * self.columns : stop - row * self.columns]

    def run(self, start: int, size: int) -> Elements:
        """Return some of the elements, not yet computed."""
        return replace(self, size=size, first=self.first + start)
