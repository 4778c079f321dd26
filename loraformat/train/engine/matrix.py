"""Frozen weights as matrices that are read in blocks and are never whole in memory.

Each block is written into one reused buffer of the thread that asks: NF4 codes are dequantized
(equations 1 to 4 of QLoRA, arXiv:2305.14314, backwards), other numbers widened. The matrix itself
stays where it lies, mapped from a shard.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch

from loraformat.nf4 import codec
from loraformat.nf4.rows import dequantize_rows, multiply_rows
from loraformat.tensors.arrays import Array, numpy_dtype
from loraformat.tensors.dtypes import WEIGHT_DTYPES, torch_dtype
from loraformat.train.engine.buffers import workspace

__all__ = [
    "DenseMatrix",
    "Matrix",
    "NF4Matrix",
    "Range",
    "StandInMatrix",
    "Tile",
    "WrappedMatrix",
    "decoding",
    "output_tiles",
]

#: Bytes of a tile: enough for the threads that decode it together.
_TILE = 16 << 20
_FEWEST_ROWS = 64
_ALIGNED_ROWS = 16

_CPU = torch.device("cpu")
_ROUNDED = {torch_dtype(name): numpy_dtype(name) for name in WEIGHT_DTYPES.values()}

#: Apart, so that neighbouring outputs read inputs that are none.
_STRIDE = 7919


class DequantTimer:
    """Time that this process has spent on dequantization, summed over threads."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._adding = threading.Lock()

    def since(self, began: float) -> None:
        """Add the time since a reading of ``time.perf_counter``."""
        with self._adding:
            self.seconds += time.perf_counter() - began


decoding = DequantTimer()

#: First and end.
Range = tuple[int, int]

#: First row, end row, and these rows.
Tile = tuple[int, int, torch.Tensor]


class Matrix(ABC):
    """A frozen weight.

    Attributes
    ----------
    rows, columns : int
        As it is stored.
    in_out_layout : bool
        Its rows are input features (``Conv1D``, some experts); else they are output features.
    device : torch.device
        Where its blocks are.
    """

    def __init__(
        self, shape: Sequence[int], *, in_out_layout: bool, device: torch.device = _CPU
    ) -> None:
        self.rows, self.columns = shape
        self.in_out_layout, self.device = in_out_layout, device

    @property
    def in_features(self) -> int:
        """Number of input features."""
        return self.rows if self.in_out_layout else self.columns

    @property
    def out_features(self) -> int:
        """Number of output features."""
        return self.columns if self.in_out_layout else self.rows

    def row_chunks(self) -> Iterator[Range]:
        """Yield ranges of rows, in order; each is multiplied before the next is asked for.

        By default all rows at once: a layer is in memory while it is computed.
        """
        yield 0, self.rows

    @abstractmethod
    def block(self, rows: Range, columns: Range, dtype: torch.dtype) -> torch.Tensor:
        """Return a part of it, until the same thread asks for another."""

    @abstractmethod
    def tiles(self, dtype: torch.dtype) -> Iterator[Tile]:
        """Yield all rows, some at a time, in order; each tile is overwritten by the next."""


class WrappedMatrix(Matrix):
    """A matrix whose numbers are those of another one."""

    def __init__(self, matrix: Matrix) -> None:
        super().__init__(
            (matrix.rows, matrix.columns),
            in_out_layout=matrix.in_out_layout,
            device=matrix.device,
        )
        self.matrix = matrix

    def row_chunks(self) -> Iterator[Range]:
        """Yield what the matrix yields."""
        return self.matrix.row_chunks()

    def block(self, rows: Range, columns: Range, dtype: torch.dtype) -> torch.Tensor:
        """Return the matrix's block."""
        return self.matrix.block(rows, columns, dtype)

    def tiles(self, dtype: torch.dtype) -> Iterator[Tile]:
        """Yield the matrix's tiles."""
        return self.matrix.tiles(dtype)


def _row_ranges(rows: int, columns: int, dtype: torch.dtype, size: int) -> Iterator[Range]:
    fitting = size // dtype.itemsize // max(columns, 1)
    step = max(_FEWEST_ROWS, fitting // _ALIGNED_ROWS * _ALIGNED_ROWS)
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


class NF4Matrix(Matrix):
    """A matrix in NF4: `rows` x `columns` of the elements of a quantized tensor.

    The codes may be those of a stack of matrices: `offset` is the element at which this one begins.

    Examples
    --------
    >>> import numpy
    >>> weight = numpy.array([[1.0, -1.0], [0.0, 1.0]], numpy.float32)
    >>> matrix = NF4Matrix(codec.quantize(weight, double_quant=False), (2, 2))
    >>> [(start, stop, tile.tolist()) for start, stop, tile in matrix.tiles(torch.float32)]
    [(0, 2, [[1.0, -1.0], [0.0, 1.0]])]
    """

    def __init__(
        self,
        codes: codec.NF4,
        shape: tuple[int, int],
        *,
        offset: int = 0,
        in_out_layout: bool = False,
    ) -> None:
        super().__init__(shape, in_out_layout=in_out_layout)
        self.codes, self.offset = codes, offset

    def block(self, rows: Range, columns: Range, dtype: torch.dtype) -> torch.Tensor:
        """Return a part: ``level * scale`` in float32, rounded once to `dtype`.

        A float64 one holds the float32 values.
        """
        decoded = torch.float32 if dtype == torch.float64 else dtype
        shape = rows[1] - rows[0], columns[1] - columns[0]
        block, array = workspace.take_pair("block", shape, decoded)
        first = self.offset + rows[0] * self.columns + columns[0]
        began = time.perf_counter()
        dequantize_rows(self.codes, array, start=first, stride=self.columns)
        decoding.since(began)
        return block if decoded == dtype else block.to(dtype)

    def multiply_few(self, x: Array, rows: Range, dtype: torch.dtype, out: Array) -> None:
        """Write x Mᵀ of some rows of M, as `block` decodes them, for very few rows of x.

        `x` is float32 (tokens, columns), contiguous, and rounded by the caller; weights are rounded
        to `dtype`. `out` is float32 (tokens, rows of the whole matrix).
        """
        began = time.perf_counter()
        first = self.offset + rows[0] * self.columns
        multiply_rows(self.codes, x, out[:, slice(*rows)], start=first, dtype=_ROUNDED[dtype])
        decoding.since(began)

    def tiles(self, dtype: torch.dtype) -> Iterator[Tile]:
        """Yield rows, decoded as those of a block; each tile by all threads."""
        decoded = torch.float32 if dtype == torch.float64 else dtype
        for start, stop in _row_ranges(self.rows, self.columns, decoded, _TILE):
            tile, array = workspace.take_pair("tile", (stop - start, self.columns), decoded)
            first = self.offset + start * self.columns
            codec.dequantize(self.codes, out=array, start=first, stop=first + array.size)
            yield start, stop, tile if decoded == dtype else tile.to(dtype)


class DenseMatrix(Matrix):
    """A matrix of ordinary numbers, of any floating dtype, maybe mapped: read, never written.

    Examples
    --------
    >>> matrix = DenseMatrix(torch.ones(2, 3, dtype=torch.bfloat16))
    >>> [tile.dtype for _, _, tile in matrix.tiles(torch.float32)]
    [torch.float32]
    """

    def __init__(self, values: torch.Tensor, *, in_out_layout: bool = False) -> None:
        super().__init__(values.shape, in_out_layout=in_out_layout, device=values.device)
        self.values = values

    def block(self, rows: Range, columns: Range, dtype: torch.dtype) -> torch.Tensor:
        """Return a part, rounded to nearest even where `dtype` holds less than it does."""
        values = self.values[slice(*rows), slice(*columns)]
        if values.dtype == dtype:
            return values
        return workspace.take("block", tuple(values.shape), dtype).copy_(values)

    def tiles(self, dtype: torch.dtype) -> Iterator[Tile]:
        """Yield rows, rounded as those of a block."""
        for start, stop in _row_ranges(self.rows, self.columns, dtype, _TILE):
            values = self.values[start:stop]
            if values.dtype != dtype:
                values = workspace.take("tile", tuple(values.shape), dtype).copy_(values)
            yield start, stop, values


def output_tiles(matrix: Matrix) -> Iterator[Tile]:
    """Yield a weight as (first output, end output, float32 [outputs, in features]).

    Each tile is overwritten by the next. A matrix whose rows are input features is decoded as a
    whole for it.
    """
    if not matrix.in_out_layout:
        yield from matrix.tiles(torch.float32)
        return
    columns = [tile.T.clone() for _, _, tile in matrix.tiles(torch.float32)]
    yield 0, matrix.columns, torch.cat(columns, 1)


class StandInMatrix(WrappedMatrix):
    """Stand-in for a matrix in trials: each output is one input, times 1/2 or -1/2.

    Examples
    --------
    >>> matrix = StandInMatrix(DenseMatrix(torch.zeros(3, 2)))
    >>> matrix.product(torch.tensor([2.0, 4.0]))
    tensor([ 1., -2.,  1.])
    >>> matrix.transposed_product(torch.tensor([2.0, 4.0, 2.0]))
    tensor([ 2., -2.])
    """

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """Return x Wᵀ."""
        places, signs = self._places(x)
        return x.detach().index_select(-1, places) * signs

    def transposed_product(self, gradient: torch.Tensor) -> torch.Tensor:
        """Return y W."""
        places, signs = self._places(gradient)
        result = gradient.new_zeros(*gradient.shape[:-1], self.in_features)
        return result.index_add_(-1, places, gradient.detach() * signs)

    def _places(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        numbers = torch.arange(self.out_features, device=like.device)
        return numbers * _STRIDE % self.in_features, (0.5 - numbers % 2).to(like.dtype)
