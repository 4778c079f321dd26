"""Products with frozen weights that are dequantized block by block.

A matrix M as it is stored gives x Mᵀ by rows: some of them give columns of the result. It gives
x M by columns: some of them give as many of the result, summed over a few thousand rows at a time.
A block is dequantized and multiplied by one thread, while it is in the cache of its core. No thread
adds to what another computes, and threads wait for each other only at the end: a wait for each
block would cost as much as dequantizing it.

Each block is multiplied by the library that is fastest for it. For float32 torch calls MKL, which
on AMD's processors leaves a tenth to a half of the speed: 110 to 190 GF/s on two cores where
oneDNN, which torch brings as well, reaches 180 to 210 (Zen 4, 128 to 512 tokens). Elsewhere, and
for other types, torch's own choice stands. oneDNN has fast kernels for a second factor that lies in
one piece, in either order. Part of a wider matrix it multiplies by a plain loop, 200 to 4000 times
slower: such a part is copied first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import torch

from loraformat.nf4.kernels.threads import run
from loraformat.train.engine.buffers import empty_matrix, workspace
from loraformat.train.engine.compute_dtype import cpu_features
from loraformat.train.engine.matrix import Matrix, NF4Matrix, Range, StandInMatrix

__all__ = [
    "even_rows",
    "multiply",
    "multiply_transposed",
    "threaded_product",
    "times",
    "times_transposed",
]

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

#: Fewer rows than this are not worth a copy.
_FEW_ROWS = 32


def multiply(
    x: torch.Tensor, matrix: Matrix, dtype: torch.dtype, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Return x Wᵀ for (..., in features) and W of (out features, in features); no gradient.

    `dtype` is that of the factors, unless `x` is float64. The result may be in `out`: (tokens, out
    features), of the dtype of `x`.

    Examples
    --------
    >>> from loraformat.train.engine.matrix import DenseMatrix
    >>> multiply(torch.ones(1, 2), DenseMatrix(torch.tensor([[3.0, 4.0]])), torch.float32)
    tensor([[7.]])
    """
    if isinstance(matrix, StandInMatrix):
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
    if isinstance(matrix, StandInMatrix):
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
    return factor, empty_matrix(x, len(factor), width)


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
        fitting = _BLOCK // factor.itemsize
        _spread(piece, stretch, matrix.columns, fitting, _ALIGNED_ROWS, matrix)
    return _shaped(result, x)


def _by_rows_of_few(factor: torch.Tensor, matrix: NF4Matrix) -> torch.Tensor:
    """Return x Mᵀ in float32 for so few tokens that M had better not be written to memory."""
    x = factor.float().contiguous()
    y = x.new_empty(len(x), matrix.rows)
    of_x, of_y = x.numpy(), y.numpy()

    def piece(start: int, stop: int) -> None:
        matrix.multiply_few(of_x, (start, stop), factor.dtype, of_y)

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

    deep, fitting = rows[1] - rows[0], _BLOCK // x.itemsize
    _spread(piece, (0, matrix.columns), deep, fitting, _ALIGNED_COLUMNS, matrix)


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
    threaded_product(piece, *whole, largest, multiple, few=(whole[1] - whole[0]) * other < _FEW)


def _exact(like: torch.Tensor) -> torch.Tensor:
    """Return where to add up numbers, undefined: bfloat16 would be rounded with each of them."""
    if like.dtype in (torch.float32, torch.float64):
        return like
    return workspace.take("sums", tuple(like.shape), torch.float32, like.device)


def times_transposed(
    x: torch.Tensor, w: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Return x wᵀ of (m, k) and (n, k), maybe in `out` of any floating dtype; no gradient.

    Examples
    --------
    >>> times_transposed(torch.ones(2, 3), torch.ones(1, 3))
    tensor([[3.],
            [3.]])
    """
    if out is None or out.dtype != x.dtype:
        y = _onednn(x, w) if _suits_onednn(x) else x @ w.T
        return y if out is None else out.copy_(y)
    if _suits_onednn(x):
        return out.copy_(_onednn(x, w))
    return torch.mm(x, w.T, out=out)


def times(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Return x w of two matrices of one dtype; no gradient.

    Examples
    --------
    >>> times(torch.ones(2, 3), torch.ones(3, 1))
    tensor([[3.],
            [3.]])
    """
    return _onednn(x, w.T) if _suits_onednn(x) else x @ w


def even_rows(x: torch.Tensor) -> torch.Tensor:
    """Return a matrix with one more row, of zeros, if it has an odd number and more than a few.

    An odd number of rows costs oneDNN a fifth to a third of its speed. What it does not multiply
    is returned as it is.

    Examples
    --------
    >>> x = torch.ones(33, 2, dtype=torch.bfloat16)
    >>> even_rows(x).shape, even_rows(x[:1]).shape
    (torch.Size([34, 2]), torch.Size([1, 2]))
    """
    if len(x) % 2 == 0 or len(x) < _FEW_ROWS or x.device.type != "cpu":
        return x
    if x.dtype not in (torch.bfloat16, torch.float16) and not _suits_onednn(x):
        return x
    return torch.nn.functional.pad(x, (0, 0, 0, 1))


def _onednn(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, _packed(w), None, "none", [], "")
    return y


def _packed(w: torch.Tensor) -> torch.Tensor:
    """Return a contiguous matrix, in either order: it, or this thread's copy."""
    if w.is_contiguous() or w.T.is_contiguous():
        return w
    w, turned = (w.T, True) if w.stride(0) == 1 else (w, False)
    copy = workspace.take("packed", tuple(w.shape), w.dtype).copy_(w)
    return copy.T if turned else copy


def _suits_onednn(x: torch.Tensor) -> bool:
    on_cpu = x.dtype == torch.float32 and x.device.type == "cpu"
    return on_cpu and x.numel() > 0 and _prefers_onednn()


@cache
def _prefers_onednn() -> bool:
    """Tell whether float32 products are to go to oneDNN here, whose operator has no public name."""
    there: bool = torch.backends.mkldnn.is_available()
    there = there and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return there and "AuthenticAMD" in cpu_features()


def threaded_product(
    work: Callable[[int, int], None],
    begin: int,
    end: int,
    largest: int,
    multiple: int,
    *,
    few: bool = False,
) -> None:
    """Call ``work(start, stop)`` on pieces that cover ``range(begin, end)``, without gradients.

    Each is computed, with torch, in one thread. The pieces are of about one size, `largest` at
    most, and all but the last a multiple of `multiple` long; each of torch's threads gets as many
    as the others. With `few`, so little is to be done that one piece is better than one for each.

    Examples
    --------
    >>> found = []
    >>> threaded_product(lambda *piece: found.append(piece), 0, 100, largest=64, multiple=16)
    >>> sorted(found)[0][0], sorted(found)[-1][1]
    (0, 100)
    """
    total, threads = end - begin, torch.get_num_threads()
    inference = torch.is_inference_mode_enabled()

    def piece(start: int, stop: int) -> None:
        with torch.inference_mode(inference), torch.no_grad():
            work(begin + start, begin + stop)

    count = -(-total // largest)
    if count > 1 or not few:
        count = -(-count // threads) * threads
    grain = -(-total // max(count, 1) // multiple) * multiple
    if grain >= total:
        piece(0, total)
        return
    run(piece, total, grain, threads, in_torch=True)
