"""Linear layers whose weight stays in a mapped shard, with a place for a LoRA branch.

y = x Wᵀ + b,   then branch(x, y) if there is one: y + s · B A x (Hu 2021, equation 3)

W is dequantized block by block, forward and backward: dL/dx = dL/dy · W, and nothing of W is saved.
A branch that is a plain pair A, B is one function with W: it adds to y in place, and saves only
what the gradients of A and B need: x, which other linears may save as well, and z = A x.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from loraformat.train.engine.compute_dtype import activation_dtype
from loraformat.train.engine.matmul import multiply, multiply_transposed, times, times_transposed
from loraformat.train.engine.matrix import DenseMatrix, Matrix, NF4Matrix, Tile, output_tiles
from loraformat.train.engine.meta_model import PlaceholderWeight
from loraformat.train.engine.unneeded_products import is_left_out

__all__ = ["Branch", "FrozenLinear", "LoraFactors", "frozen_product"]


@dataclass(frozen=True, slots=True)
class LoraFactors:
    """The factors A and B of a LoRA branch, and its scaling.

    Attributes
    ----------
    a, b : torch.Tensor
        float32 (r, in features) and (out features, r). They are multiplied in the dtype of x,
        and their gradients are float32.
    scaling : float
        s.
    observe : callable, optional
        Called in the backward pass with z = A x, (tokens, r), and dL/dy, (tokens, out features).
    """

    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    observe: Callable[[torch.Tensor, torch.Tensor], None] | None = None


def frozen_product(
    x: torch.Tensor,
    matrix: Matrix,
    dtype: torch.dtype = torch.float32,
    *,
    bias: torch.Tensor | None = None,
    pair: LoraFactors | None = None,
) -> torch.Tensor:
    """Multiply by a frozen weight, differentiably in `x` and in the LoRA factors; add a bias.

    `x` is (..., in features), float32 or bfloat16; or float64, which is then computed with. `dtype`
    is that of the factors of each product. Sums over blocks are float32, or float64 for float64.

    Examples
    --------
    >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> y = frozen_product(x, DenseMatrix(torch.tensor([[3.0, 4.0]])))
    >>> y.sum().backward()
    >>> y.tolist(), x.grad.tolist()
    ([11.0], [3.0, 4.0])
    """
    y: torch.Tensor
    if pair is None:
        y = _FrozenProduct.apply(x, matrix, dtype, bias)  # type: ignore[no-untyped-call]
    else:
        y = _AdaptedProduct.apply(  # type: ignore[no-untyped-call]
            x, pair.a, pair.b, matrix, dtype, bias, pair.scaling, pair.observe
        )
    return y


class _FrozenProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, matrix: Matrix, dtype: torch.dtype, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.matrix, ctx.dtype = matrix, dtype
        if is_left_out(matrix):
            return _nothing(x, matrix)
        y = multiply(x, matrix, dtype)
        # autograd takes ``data`` for no view: a model may add to it in place
        return (y if bias is None else y.add_(bias)).data

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None]:
        return multiply_transposed(gradient, ctx.matrix, ctx.dtype), None, None, None


class _AdaptedProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        matrix: Matrix,
        dtype: torch.dtype,
        bias: torch.Tensor | None,
        scaling: float,
        observe: Callable[[torch.Tensor, torch.Tensor], None] | None,
    ) -> torch.Tensor:
        ctx.matrix, ctx.dtype, ctx.scaling, ctx.observe = matrix, dtype, scaling, observe
        # this way round it reads x along its rows
        z = times_transposed(a.to(x.dtype), _rows(x)).T
        ctx.save_for_backward(x, z, a, b)
        if is_left_out(matrix):
            return _nothing(x, matrix)
        y = multiply(x, matrix, dtype)
        if bias is not None:
            y.add_(bias)
        _rows(y).addmm_(z, b.to(x.dtype).T, alpha=scaling)
        return y.data  # as in `_FrozenProduct`

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, z, a, b = ctx.saved_tensors
        of_y = _rows(gradient)
        of_z = times_transposed(b.to(x.dtype).T, of_y).T.mul_(ctx.scaling)
        of_x = of_a = of_b = None
        if ctx.needs_input_grad[0]:
            of_x = multiply_transposed(gradient, ctx.matrix, ctx.dtype)
            _rows(of_x).addmm_(of_z, a.to(x.dtype))
        if ctx.needs_input_grad[1]:
            of_a = times(of_z.T, _rows(x)).to(a.dtype)
        if ctx.needs_input_grad[2]:
            of_b = times(z.T, of_y).T.to(b.dtype).mul_(ctx.scaling)
        if ctx.observe is not None:
            ctx.observe(z, of_y)
        return of_x, of_a, of_b, None, None, None, None, None


def _nothing(x: torch.Tensor, matrix: Matrix) -> torch.Tensor:
    """Return NaN in place of a product that is not needed: whatever reads it gives NaN, too.

    They take memory as the product does, since a model may add to it in place.
    """
    return x.new_full((*x.shape[:-1], matrix.out_features), torch.nan)


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1])


class Branch(Protocol):
    """A trained branch of a frozen layer."""

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
        self.in_features, self.out_features = matrix.in_features, matrix.out_features
        self.register_buffer("bias", bias, persistent=False)
        self.branch: Branch | None = None
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
        """Compute the layer for (..., in features), in the dtype of `x`."""
        if self.branch is None:
            return frozen_product(x, self.matrix, self.dtype, bias=self.bias)
        pair = self.branch.pair()
        y = frozen_product(x, self.matrix, self.dtype, bias=self.bias, pair=pair)
        return y if pair is not None else self.branch(x, y)

    def dense_tiles(self) -> Iterator[Tile]:
        """Yield the weight as `output_tiles` does."""
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
