"""y = x Wᵀ with a frozen W that is decoded tile by tile, forward and backward.

Forward, each tile of W gives some columns of y. Backward, dL/dx = Σ dL/dy[tile] · W[tile]: the
tiles are decoded again and the sum is kept in the dtype of x. Nothing of W is saved, and x is not
needed, as W has no gradient.
"""

from __future__ import annotations

from typing import Any

import torch

from loraformat.train.engine.matrix import Matrix

__all__ = ["frozen_product", "multiply", "multiply_transposed"]


def frozen_product(
    x: torch.Tensor, matrix: Matrix, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Multiply by a frozen weight, differentiably in `x`.

    Parameters
    ----------
    x : torch.Tensor
        (..., in features), float32; or float64, which is then computed with.
    matrix : Matrix
    dtype : torch.dtype
        Of the factors of each product; the sums over tiles have the dtype of `x`.

    Returns
    -------
    torch.Tensor
        (..., out features), dtype of `x`.

    Examples
    --------
    >>> from loraformat.train.engine.matrix import DenseMatrix
    >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> y = frozen_product(x, DenseMatrix(torch.tensor([[3.0, 4.0]])))
    >>> y.sum().backward()
    >>> y.tolist(), x.grad.tolist()
    ([11.0], [3.0, 4.0])
    """
    result: torch.Tensor = _FrozenProduct.apply(x, matrix, dtype)  # type: ignore[no-untyped-call]
    return result


class _FrozenProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, matrix: Matrix, dtype: torch.dtype) -> torch.Tensor:
        ctx.matrix, ctx.dtype = matrix, dtype
        return multiply(x, matrix, dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return multiply_transposed(gradient, ctx.matrix, ctx.dtype), None, None


def multiply(
    x: torch.Tensor, matrix: Matrix, dtype: torch.dtype, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Return x Wᵀ, W being (out features, in features), maybe in `out`; no gradient."""
    return (_reduce if matrix.by_inputs else _expand)(x, matrix, dtype, out)


def multiply_transposed(x: torch.Tensor, matrix: Matrix, dtype: torch.dtype) -> torch.Tensor:
    """Return x W, W being (out features, in features); no gradient."""
    return (_expand if matrix.by_inputs else _reduce)(x, matrix, dtype, None)


def _factor(x: torch.Tensor, width: int, dtype: torch.dtype) -> torch.Tensor:
    flat = x.reshape(-1, width)
    return flat if flat.dtype in (dtype, torch.float64) else flat.to(dtype)


def _expand(
    x: torch.Tensor, matrix: Matrix, dtype: torch.dtype, out: torch.Tensor | None
) -> torch.Tensor:
    """Return x Mᵀ for M as stored: a tile of rows gives columns of the result."""
    factor = _factor(x, matrix.columns, dtype)
    result = x.new_empty(len(factor), matrix.rows) if out is None else out
    for start, stop, tile in matrix.tiles(factor.dtype):
        part = result[:, start:stop]
        if part.dtype == tile.dtype:
            torch.mm(factor, tile.T, out=part)
        else:
            part.copy_(factor @ tile.T)
    return result.view(*x.shape[:-1], matrix.rows)


def _reduce(
    x: torch.Tensor, matrix: Matrix, dtype: torch.dtype, out: torch.Tensor | None
) -> torch.Tensor:
    """Return x M for M as stored: each tile of rows adds to all of the result."""
    factor = _factor(x, matrix.rows, dtype)
    result = x.new_zeros(len(factor), matrix.columns) if out is None else out.zero_()
    for start, stop, tile in matrix.tiles(factor.dtype):
        if result.dtype == tile.dtype:
            result.addmm_(factor[:, start:stop], tile)
        else:
            result += factor[:, start:stop] @ tile
    return result.view(*x.shape[:-1], matrix.columns)
