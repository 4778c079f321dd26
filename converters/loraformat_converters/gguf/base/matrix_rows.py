"""A matrix within a lazy tensor, of which transforms read rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy

from loraformat.model.checkpoint import DenseTensor, LazyTensor, NF4Tensor
from loraformat.model.rows import RowReader, RowSource
from loraformat.tensors.arrays import Array, numpy_dtype
from loraformat_converters.gguf.architectures.tensor_map import TensorSlice

__all__ = ["MatrixRows", "TensorReader"]


@dataclass(frozen=True, slots=True)
class MatrixRows:
    """What stands in the place of a matrix's array: rows that are computed when they are indexed.

    Examples
    --------
    >>> matrix = MatrixRows(lambda a, b: numpy.arange(3 * a, 3 * b).reshape(-1, 3), 1, (4, 3))
    >>> matrix[0:1].tolist(), matrix[numpy.array([3, 0])].tolist()
    ([[3, 4, 5]], [[12, 13, 14], [3, 4, 5]])
    """

    read: RowReader
    first: int
    shape: tuple[int, ...]

    def __getitem__(self, rows: slice | Array) -> Array:
        if isinstance(rows, slice):
            start, stop, _ = rows.indices(self.shape[0])
            return self.read(self.first + start, self.first + stop)
        order = numpy.unique(rows)
        runs = numpy.split(order, numpy.flatnonzero(numpy.diff(order) > 1) + 1)
        found = [self.read(self.first + run[0], self.first + run[-1] + 1) for run in runs]
        return numpy.concatenate(found)[numpy.searchsorted(order, rows)]


class TensorReader:
    """A tensor of the source, whole if it is stored so, by rows if it is computed.

    NF4 is decoded to float32. Rows are not enough for a transform that turns the tensor round.
    """

    def __init__(self, tensor: LazyTensor, by_rows: bool) -> None:
        self.name, self._shape = tensor.name, tensor.shape
        self._array: Array | None = None
        if isinstance(tensor, NF4Tensor):
            self.dtype: numpy.dtype[Any] = numpy_dtype("F32")
            if by_rows:
                self._read = tensor.row_reader("F32")
            else:
                self._array = tensor.dequantize("F32")
        else:
            assert isinstance(tensor, DenseTensor)
            self.dtype = numpy_dtype(tensor.dtype)
            if by_rows and isinstance(tensor.load, RowSource):
                self._read = tensor.row_reader()
            else:
                self._array = tensor.array()

    def part(self, part: TensorSlice) -> Array:
        """Return a part for `Transform.rows`: a view on the array, or `MatrixRows`."""
        if self._array is not None:
            return part.of(self._array)
        first = part.start + (part.expert or 0) * self._shape[-2]
        return cast("Array", MatrixRows(self._read, first, part.shape))
