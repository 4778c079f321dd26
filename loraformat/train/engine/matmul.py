"""Products with a stored matrix that is decoded block by block, each block by who multiplies it.

M as stored gives x Mᵀ by rows: some of them give columns of the result. It gives x M by columns:
some of them give as many of the result, a sum over a few thousand rows at a time. Either way
nothing that a thread computes is added to what another does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from loraformat.train.engine.allocation import fresh
from loraformat.train.engine.buffers import workspace
from loraformat.train.engine.gemm import even_rows, times, times_transposed
from loraformat.train.engine.matrix import Matrix, NF4Matrix, Range
from loraformat.train.engine.stand_in_matrix import StandIn
from loraformat.train.engine.threaded_product import spread

__all__ = ["multiply", "multiply_transposed"]

#: Bytes of a block as it is multiplied: read from a cache that cores may share, and large enough
#: for products to run at full speed.
_BLOCK = 4 << 20

#: Rows over which is summed at once. A block has all of them and is narrow: that is read worse than
#: a broad one, but multiplied better, and there are fewer sums to add up.
_DEEP = 8192

_ALIGNED_ROWS = 64
_ALIGNED_COLUMNS = 64

#: Elements that threads had better not share.
_FEW = 1 << 17

#: Tokens for which weights are multiplied as they are decoded, and of how many at a time.
_FEW_TOKENS = 4
_PRODUCT = 1 << 21


def multiply(
    x: torch.Tensor, matrix: Matrix, dtype: torch.dtype, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Return x Wᵀ, W being (out features, in features), maybe in `out`; no gradient.

    Parameters
    ----------
    x : torch.Tensor
        (..., in features).
    matrix : Matrix
    dtype : torch.dtype
        Of the factors, unless `x` is float64.
    out : torch.Tensor, optional
        (tokens, out features), of the dtype of `x`.

    Examples
    --------
    >>> from loraformat.train.engine.matrix import DenseMatrix
    >>> multiply(torch.ones(1, 2), DenseMatrix(torch.tensor([[3.0, 4.0]])), torch.float32)
    tensor([[7.]])
    """
    if isinstance(matrix, StandIn):
        return matrix.product(x)
    return (_by_columns if matrix.in_out_layout else _by_rows)(x, matrix, dtype, out)


def multiply_transposed(x: torch.Tensor, matrix: Matrix, dtype: torch.dtype) -> torch.Tensor:
    """Return x W, W being (out features, in features); no gradient.

    Examples
    --------
    >>> from loraformat.train.engine.matrix import DenseMatrix
    >>> matrix = DenseMatrix(torch.tensor([[3.0, 4.0]]))
    >>> multiply_transposed(torch.ones(1, 1), matrix, torch.float32)
    tensor([[3., 4.]])
    """
    if isinstance(matrix, StandIn):
        return matrix.transposed_product(x)
    return (_by_rows if matrix.in_out_layout else _by_columns)(x, matrix, dtype, None)


def _operands(
    x: torch.Tensor, dtype: torch.dtype, width: int, out: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x as a matrix to be multiplied, and where the product goes: maybe a row more."""
    factor = x.detach().reshape(-1, x.shape[-1])
    if factor.dtype not in (dtype, torch.float64):
        factor = factor.to(dtype)
    if out is not None:
        return factor, out
    factor = even_rows(factor)
    return factor, fresh(x, len(factor), width)


def _shaped(result: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return the rows that are x's, in its shape."""
    rows = x.shape[:-1]
    return result[: rows.numel()].view(*rows, result.shape[1])


def _by_rows(
    x: torch.Tensor, matrix: Matrix, dtype: torch.dtype, out: torch.Tensor | None
) -> torch.Tensor:
    """Return x Mᵀ for M as stored."""
    factor, result = _operands(x, dtype, matrix.rows, out)
    exact = factor.dtype == torch.float64
    if len(factor) <= _FEW_TOKENS and not exact and isinstance(matrix, NF4Matrix):
        result.copy_(_by_rows_of_few(factor, matrix))
        return _shaped(result, x)

    def piece(start: int, stop: int) -> None:
        block = matrix.block((start, stop), (0, matrix.columns), factor.dtype)
        times_transposed(factor, block, out=result[:, start:stop])

    for stretch in matrix.row_chunks():
        _spread(piece, stretch, matrix.columns, _fitting(factor.dtype), _ALIGNED_ROWS, matrix)
    return _shaped(result, x)


def _by_rows_of_few(factor: torch.Tensor, matrix: NF4Matrix) -> torch.Tensor:
    """Return x Mᵀ in float32 for so few tokens that M had better not be written to memory."""
    x = factor.float().contiguous()
    y = x.new_empty(len(x), matrix.rows)

    def piece(start: int, stop: int) -> None:
        matrix.multiply_few(x, (start, stop), factor.dtype, y)

    _spread(piece, (0, matrix.rows), matrix.columns, _PRODUCT, _ALIGNED_ROWS, matrix)
    return y


def _by_columns(
    x: torch.Tensor, matrix: Matrix, dtype: torch.dtype, out: torch.Tensor | None
) -> torch.Tensor:
    """Return x M for M as stored."""
    factor, result = _operands(x, dtype, matrix.columns, out)
    if matrix.rows == 0:
        result.zero_()
    sums = result
    for first, last in _steps(matrix):
        if first == 0 and last < matrix.rows:
            sums = _exact(result)
        _add_rows(_columns(factor, first, last), matrix, (first, last), sums)
    if sums is not result:
        result.copy_(sums)
    return _shaped(result, x)


def _columns(x: torch.Tensor, first: int, last: int) -> torch.Tensor:
    """Return some columns, contiguous: they are multiplied many times, and faster so.

    Copies are made in one buffer: fresh ones would leave holes between activations that are kept.
    """
    part = x[:, first:last]
    if part.is_contiguous():
        return part
    return workspace.take("columns", tuple(part.shape), x.dtype, x.device).copy_(part)


def _steps(matrix: Matrix) -> Iterator[Range]:
    """Yield the rows of a matrix that are summed over at once."""
    for first, last in matrix.row_chunks():
        parts = -(-(last - first) // _DEEP) if matrix.device.type == "cpu" else 1
        size = -(-(last - first) // max(parts, 1) // _ALIGNED_ROWS) * _ALIGNED_ROWS
        for start in range(first, last, max(size, 1)):
            yield start, min(start + size, last)


def _add_rows(x: torch.Tensor, matrix: Matrix, rows: Range, sums: torch.Tensor) -> None:
    """Add to sums, or begin them, what some rows of a matrix contribute."""

    def piece(start: int, stop: int) -> None:
        product = times(x, matrix.block(rows, (start, stop), x.dtype))
        if rows[0] == 0:
            sums[:, start:stop] = product
        else:
            sums[:, start:stop] += product

    deep = rows[1] - rows[0]
    _spread(piece, (0, matrix.columns), deep, _fitting(x.dtype), _ALIGNED_COLUMNS, matrix)


def _spread(
    piece: Callable[[int, int], None],
    whole: Range,
    other: int,
    elements: int,
    multiple: int,
    matrix: Matrix,
) -> None:
    """Call for pieces of rows or columns, of at most so many elements; on a device for all."""
    if matrix.device.type != "cpu":
        piece(*whole)
        return
    largest = max(multiple, elements // max(other, 1) // multiple * multiple)
    spread(piece, *whole, largest, multiple, few=(whole[1] - whole[0]) * other < _FEW)


def _fitting(dtype: torch.dtype) -> int:
    return _BLOCK // dtype.itemsize


def _exact(like: torch.Tensor) -> torch.Tensor:
    """Return where to add up numbers, undefined: bfloat16 would be rounded with each of them."""
    if like.dtype in (torch.float32, torch.float64):
        return like
    return workspace.take("sums", tuple(like.shape), torch.float32, like.device)
