"""A module that a low-rank branch can be added to.

The engine's layers describe themselves by a `TargetModule`; the LoRA side knows nothing else of
them: a name, a shape, the weight in tiles, and where the branch goes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

__all__ = ["TargetModule"]


@dataclass(frozen=True, slots=True)
class TargetModule:
    """A place where a branch can be trained.

    Attributes
    ----------
    name : str
        Of the module in transformers' model; of experts, the name of their parameter
        (``model.layers.0.mlp.experts.down_proj``), and of a router (``...mlp.gate.weight``).
    kind : {"linear", "head", "embedding", "experts", "parameter"}
        A linear of a decoder layer, the output head, the token embedding, a stack of linears, or
        a matrix that its class multiplies by itself: that of a router.
    in_features, out_features : int
        Of y = W x. Of an embedding: tokens and width.
    tiles : callable
        ``tiles(expert)`` yields (first row, row after the last, float32 tile) of the weight as
        the model computes with it, in order; the expert's number is 0 where there are none. A
        tile is (rows, in); of an embedding the rows are tokens: (rows, out). It is only valid
        until the next one is taken, and must not be written to.
    attach : callable
        Gives the layer its branch.
    target : str
        Name of the weight in the bundle; that of the module with ``.weight`` if it is empty.
    experts : int
        Matrices in the stack; 0 where there is none.
    transposed : bool
        The bundle holds the weight as (in, out), and so a delta of it: ``Conv1D`` and a few
        models' experts.
    quantized : bool
        The bundle holds the weight in NF4.
    bias : torch.Tensor or None
        (out,), added to the product before the branch sees it.
    output_scale : float
        What the layer multiplies its rows by before the branch sees them (Gemma's embedding).
    device : torch.device or None
        Where the layer computes; None for the CPU.
    in_peft : {"module", "parameter", "refused"}
        What PEFT wraps to adapt a linear; see `is_parameter`.
    shared : bool
        Other places compute with the same weight, and a delta of it would act in all of them.
    in_layers : bool
        It stands in a decoder layer; what does not is trained if it is named.
    """

    name: str
    kind: Literal["linear", "head", "embedding", "experts", "parameter"]
    in_features: int
    out_features: int
    tiles: Callable[[int], Iterator[tuple[int, int, torch.Tensor]]]
    attach: Callable[[torch.nn.Module], None]
    target: str = ""
    experts: int = 0
    transposed: bool = False
    quantized: bool = False
    bias: torch.Tensor | None = None
    output_scale: float = 1.0
    device: torch.device | None = None
    in_peft: Literal["module", "parameter", "refused"] = "module"
    shared: bool = False
    in_layers: bool = True

    @property
    def is_parameter(self) -> bool:
        """Tell whether PEFT adapts a parameter here, which has neither dropout nor magnitude."""
        return self.kind in ("experts", "parameter") or self.in_peft == "parameter"

    @property
    def weight_name(self) -> str:
        """Name of the weight in the bundle."""
        return self.target or self.stored_name

    @property
    def stored_name(self) -> str:
        """Name of the weight in transformers' model."""
        return self.name if self.kind in ("experts", "parameter") else f"{self.name}.weight"
