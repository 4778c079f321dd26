"""Linear layers whose weight stays in a mapped shard, with a place for a LoRA branch.

y = x Wᵀ + b,   then branch(x, y) if there is one: y + s · B A x (Hu 2021, equation 3)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch

from loraformat.train.engine.compute_dtype import activation_dtype
from loraformat.train.engine.lora_matmul import LoraFactors, frozen_product
from loraformat.train.engine.matrix import DenseMatrix, Matrix, NF4Matrix, Tile, output_tiles
from loraformat.train.engine.meta_model import PlaceholderWeight

__all__ = ["Branch", "FrozenLinear"]


class Branch(Protocol):
    """A trained branch beside a frozen layer."""

    def pair(self) -> LoraFactors | None:
        """Return the branch as a plain pair, if it is one just now: then that is multiplied."""
        ...

    def __call__(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return the output, given the input and the frozen output."""
        ...


class FrozenLinear(torch.nn.Module):
    """A linear layer with a frozen weight, in place of ``nn.Linear`` or ``Conv1D``.

    Parameters
    ----------
    matrix : Matrix
    name : str
        Hugging Face name of the module.
    bias : torch.Tensor, optional
        (out features,).
    conv1d : bool
        The base's own weight is (in features, out features); how it is stored is another
        matter, see `loraformat.model.checkpoint.NF4Tensor`.
    dtype : torch.dtype
        Of the factors of the frozen product.

    Attributes
    ----------
    in_features, out_features : int
    bias : torch.Tensor or None
    branch : Module or None
        A `Branch`.
    layer : int or None
        Number of the decoder layer it stands in; None for the head, and for other towers.
    device : torch.device
        Where it computes.
    quantized : bool
        The bundle holds it in NF4.
    shown : torch.Tensor or None
        What `weight` is, for those who must look at it: mapped, in its own dtype, to be read only.

    Examples
    --------
    >>> import numpy
    >>> from loraformat.nf4 import codec
    >>> codes = codec.quantize(numpy.array([[2.0, -2.0]], numpy.float32), double_quant=False)
    >>> FrozenLinear(NF4Matrix(codes, (1, 2)))(torch.tensor([[3.0, 1.0]]))
    tensor([[4.]])
    """

    bias: torch.Tensor | None

    def __init__(
        self,
        matrix: Matrix,
        name: str = "",
        bias: torch.Tensor | None = None,
        *,
        conv1d: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.matrix, self.name, self.conv1d, self.dtype = matrix, name, conv1d, dtype
        sizes = (matrix.rows, matrix.columns)
        self.in_features, self.out_features = sizes if matrix.in_out_layout else sizes[::-1]
        self.register_buffer("bias", bias, persistent=False)
        self.branch: torch.nn.Module | None = None
        self.layer: int | None = None
        self.device = torch.device("cpu")
        self.quantized = isinstance(matrix, NF4Matrix)
        self.shown: torch.Tensor | None = None

    @property
    def weight(self) -> PlaceholderWeight | torch.Tensor:
        """What says the weight's shape and dtype, and holds nothing, unless it is `shown`."""
        if self.shown is not None:
            return self.shown
        shape = (self.out_features, self.in_features)
        shape = shape[::-1] if self.conv1d else shape
        return PlaceholderWeight(self.name, shape, self.device, activation_dtype(self.dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the layer.

        Parameters
        ----------
        x : torch.Tensor
            (..., in features).

        Returns
        -------
        torch.Tensor
            (..., out features), dtype of `x`.
        """
        if self.branch is None:
            return frozen_product(x, self.matrix, self.dtype, bias=self.bias)
        branch: Branch = self.branch  # type: ignore[assignment]
        pair = branch.pair()
        y = frozen_product(x, self.matrix, self.dtype, bias=self.bias, pair=pair)
        return y if pair is not None else branch(x, y)

    def dense_tiles(self) -> Iterator[Tile]:
        """Yield the weight as (first output, end output, float32 [outputs, in features]).

        Each tile is overwritten by the next.
        """
        return output_tiles(self.matrix)

    def load_weight(self) -> None:
        """Take the weight into memory, for a class that computes with it in its own way."""
        weight = torch.empty(self.out_features, self.in_features)
        for start, stop, tile in self.dense_tiles():
            weight[start:stop] = tile
        dtype = activation_dtype(self.dtype)
        self.shown = (weight.T if self.conv1d else weight).to(self.device, dtype)
        self.matrix = DenseMatrix(self.shown, in_out_layout=self.conv1d)

    def extra_repr(self) -> str:
        """Say what it is, for ``print(model)``."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"
