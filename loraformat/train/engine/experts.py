"""Mixtures of experts: fused parameters of transformers, computed from mapped weights.

transformers keeps the experts of a layer in one three-dimensional parameter for each projection.
Here each is a stack of frozen matrices, and only the experts that a batch is routed to are read.
The routing, the activation and the gate stay the model's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import MethodType
from typing import Any, Protocol

import torch

from loraformat.errors import UnsupportedError, printable
from loraformat.train.engine.layer_prefetch import LayerPrefetcher
from loraformat.train.engine.linear import LoraFactors, frozen_product
from loraformat.train.engine.matrix import Matrix, NF4Matrix, Tile, output_tiles
from loraformat.train.engine.stored_weights import Span

__all__ = ["ExpertStack", "compute_from_stacks", "is_fused_experts", "projection_names"]


class _ExpertBranch(Protocol):
    """The trained branches of a stack."""

    def pair(self, expert: int = 0) -> LoraFactors | None:
        """Return one expert's branch as a plain pair, if it is one just now."""
        ...

    def __call__(self, x: torch.Tensor, y: torch.Tensor, expert: int) -> torch.Tensor:
        """Return the output, given the input and the frozen output."""
        ...


class ExpertStack(torch.nn.Module):
    """One projection of all experts of a layer.

    Parameters
    ----------
    experts : sequence of sequence of Matrix
        Of each expert the matrices that are concatenated to its weight: one, or for
        ``gate_up_proj`` that of the gate and the other.
    name : str
        Hugging Face name of the parameter.
    in_out_layout : bool
        The base's own parameter is (experts, in features, out features).
    dtype : torch.dtype
        Of the factors of the frozen product.

    Attributes
    ----------
    in_features, out_features, count : int
        Of one expert; number of experts.
    branch : Module or None
        Called with input, frozen output and the expert's number; returns the output.
    layer, device, quantized
        As in `FrozenLinear`.
    spans : sequence of sequence of Span
        The bytes of each expert, for `read_ahead`; maybe none.
    prefetcher : LayerPrefetcher or None
        What reads them.
    """

    def __init__(
        self,
        experts: Sequence[Sequence[Matrix]],
        name: str,
        *,
        in_out_layout: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.experts, self.name, self.dtype = experts, name, dtype
        self.in_out_layout, self.count = in_out_layout, len(experts)
        first = experts[0][0]
        self.in_features = first.in_features
        self.out_features = sum(matrix.out_features for matrix in experts[0])
        self.branch: _ExpertBranch | None = None
        self.layer: int | None = None
        self.device = torch.device("cpu")
        self.quantized = isinstance(first, NF4Matrix)
        self.spans: Sequence[Sequence[Span]] = ()
        self.prefetcher: LayerPrefetcher | None = None

    def read_ahead(self, expert: int) -> None:
        """Have an expert's bytes read, after those that were asked for before."""
        if self.prefetcher is not None and self.layer is not None:
            self.prefetcher.read_part(self.layer, (self.name, expert), self.spans[expert])

    def wait(self, expert: int) -> None:
        """Wait for the bytes that `read_ahead` asked for."""
        if self.prefetcher is not None and self.layer is not None:
            self.prefetcher.wait_for_part(self.layer, (self.name, expert))

    def dense_tiles(self, expert: int) -> Iterator[Tile]:
        """Yield one expert's weight as (first output, end output, float32 [outputs, in])."""
        first = 0
        for matrix in self.experts[expert]:
            for start, stop, tile in output_tiles(matrix):
                yield first + start, first + stop, tile
            first += matrix.out_features

    def forward(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        """Compute one expert's projection of (tokens, in features)."""
        matrices = self.experts[expert]
        if len(matrices) == 1 and self.branch is not None:
            pair = self.branch.pair(expert)
            if pair is not None:
                return frozen_product(x, matrices[0], self.dtype, pair=pair)
        parts = [frozen_product(x, matrix, self.dtype) for matrix in matrices]
        y = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        return y if self.branch is None else self.branch(x, y, expert)

    def extra_repr(self) -> str:
        """Say what it is, for ``print(model)``."""
        return f"{self.count} x ({self.in_features}, {self.out_features})"


def is_fused_experts(module: torch.nn.Module) -> bool:
    """Tell whether a module is one of transformers' that hold experts in fused parameters."""
    return hasattr(module, "has_gate") and hasattr(module, "is_transposed")


def projection_names(module: Any) -> tuple[str, str]:
    """Return the names of its two parameters: into the expert, and out of it."""
    return "gate_up_proj" if module.has_gate else "up_proj", "down_proj"


def compute_from_stacks(module: Any, path: object) -> None:
    """Let a module of fused experts compute with the stacks that took its parameters' place.

    Raises
    ------
    UnsupportedError
        If its class does more than two projections, biases and a gate.
    """
    if getattr(module, "has_post_expert_norm", False):
        raise UnsupportedError(
            f"{printable(type(module).__name__)} normalises what its experts return, which "
            "training does not know",
            path=str(path),
        )
    module.forward = MethodType(_forward, module)


def _forward(
    module: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """Sum over each token's experts of weight · down(gate(up(x)))."""
    into, out = (getattr(module, name) for name in projection_names(module))
    slots = top_k_index.reshape(-1)
    counts = torch.bincount(slots, minlength=into.count)[: into.count].tolist()
    # What a router gives to no expert has a number beyond the last one's.
    order = slots.argsort(stable=True)[: sum(counts)]
    tokens, weights = order // top_k_index.shape[-1], top_k_weights.reshape(-1)[order, None]
    routed = [expert for expert in range(into.count) if counts[expert]]
    for expert in routed:
        into.read_ahead(expert)
        out.read_ahead(expert)
    # One gather for all experts: the gradient of one for each is as large as all hidden states.
    inputs = hidden_states.index_select(0, tokens).split(counts)
    places, factors = tokens.split(counts), weights.split(counts)
    total = torch.zeros_like(hidden_states)
    for expert in routed:
        into.wait(expert)
        y = into(inputs[expert], expert)
        if module.has_bias:
            y = y + getattr(module, projection_names(module)[0] + "_bias")[expert]
        y = module._apply_gate(y) if module.has_gate else module.act_fn(y)
        out.wait(expert)
        y = out(y, expert)
        if module.has_bias:
            y = y + module.down_proj_bias[expert]
        total.index_add_(0, places[expert], (y * factors[expert]).to(total.dtype))
    return total
