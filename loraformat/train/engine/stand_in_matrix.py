"""Matrices that stand in for a model's own, so that all of its layers are computed at no cost.

What a class computes, and where it lets tensors go, does not depend on its weights. To look at
that, a product is enough that is linear, full of gradient, and reads nothing from a disk.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from loraformat.train.engine.matrix import Matrix, Range, Tile

__all__ = ["StandIn"]

#: Apart, so that neighbouring outputs read inputs that are none.
_STRIDE = 7919


class StandIn:
    """Multiplies as if each output were one input, times 1/2 or -1/2.

    Parameters
    ----------
    matrix : Matrix
        For which it stands; its numbers are those of this one, for who asks.

    Examples
    --------
    >>> from loraformat.train.engine.matrix import DenseMatrix
    >>> matrix = StandIn(DenseMatrix(torch.zeros(3, 2)))
    >>> matrix.product(torch.tensor([2.0, 4.0]))
    tensor([ 1., -2.,  1.])
    >>> matrix.transposed_product(torch.tensor([2.0, 4.0, 2.0]))
    tensor([ 2., -2.])
    """

    def __init__(self, matrix: Matrix) -> None:
        self.matrix = matrix
        self.rows, self.columns, self.in_out_layout = (
            matrix.rows,
            matrix.columns,
            matrix.in_out_layout,
        )
        self.device = matrix.device
        self._inputs, self._outputs = (
            (self.rows, self.columns) if self.in_out_layout else (self.columns, self.rows)
        )

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """Return x Wᵀ."""
        places, signs = self._places(x)
        return x.detach().index_select(-1, places) * signs

    def transposed_product(self, gradient: torch.Tensor) -> torch.Tensor:
        """Return y W."""
        places, signs = self._places(gradient)
        result = gradient.new_zeros(*gradient.shape[:-1], self._inputs)
        return result.index_add_(-1, places, gradient.detach() * signs)

    def _places(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        numbers = torch.arange(self._outputs, device=like.device)
        return numbers * _STRIDE % self._inputs, (0.5 - numbers % 2).to(like.dtype)

    def row_chunks(self) -> Iterator[Range]:
        """Yield what the matrix yields."""
        return self.matrix.row_chunks()

    def block(self, rows: Range, columns: Range, dtype: torch.dtype) -> torch.Tensor:
        """Return the matrix's block."""
        return self.matrix.block(rows, columns, dtype)

    def tiles(self, dtype: torch.dtype) -> Iterator[Tile]:
        """Yield the matrix's tiles."""
        return self.matrix.tiles(dtype)
