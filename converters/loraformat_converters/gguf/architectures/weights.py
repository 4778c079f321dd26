"""Tables that map Hugging Face tensor names to GGUF tensor names.

In a template ``{base}`` stands for what precedes the layers (``model.``, or whatever the
checkpoint has), ``{layer}`` and ``{expert}`` for numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from loraformat_converters.gguf.architectures.config import Config
from loraformat_converters.gguf.architectures.transforms import (
    IDENTITY,
    HeadOrder,
    PlusOne,
    Transform,
    Transpose,
)

__all__ = [
    "Chooser",
    "ExpertWeightName",
    "WeightName",
    "bias",
    "conv1d",
    "identity",
    "key_heads",
    "layer",
    "plus_one",
    "query_heads",
    "row",
]

Chooser = Callable[[Config], Transform]


def identity(config: Config) -> Transform:
    """Leave a tensor as it is."""
    return IDENTITY


def query_heads(config: Config) -> Transform:
    """Reorder the rows of q_proj."""
    return HeadOrder(config.heads)


def key_heads(config: Config) -> Transform:
    """Reorder the rows of k_proj."""
    return HeadOrder(config.kv_heads)


def plus_one(config: Config) -> Transform:
    """Add 1, as to gemma's norms."""
    return PlusOne()


def conv1d(config: Config) -> Transform:
    """Transpose, as GPT-2's linears."""
    return Transpose()


@dataclass(frozen=True, slots=True)
class WeightName:
    """One tensor here, one tensor there.

    Attributes
    ----------
    gguf : str
        Template of the GGUF name.
    hf : str
        Template of the Hugging Face name.
    transform : callable
        Chooses the transform from Hugging Face to GGUF.
    required : bool
        Whether every model has it.
    """

    gguf: str
    hf: str
    transform: Chooser = identity
    required: bool = True

    @property
    def in_layers(self) -> bool:
        """Whether there is one in each layer."""
        return "{layer}" in self.gguf


@dataclass(frozen=True, slots=True)
class ExpertWeightName:
    """The experts of a layer: one tensor with a leading dimension in GGUF.

    Attributes
    ----------
    gguf : str
        Template, for example ``blk.{layer}.ffn_gate_exps.weight``.
    hf : str
        Template with ``{expert}``, as transformers stores them.
    fused : str
        Template of the parameter that holds them in memory since transformers 5.
    half : int or None
        Which half of the rows of each matrix of that parameter; None for all of them.
    """

    gguf: str
    hf: str
    fused: str
    half: int | None = None

    @property
    def single(self) -> str:
        """Template with ``{expert}`` of the tensors that llama.cpp wrote before April 2024.

        Examples
        --------
        >>> ExpertWeightName("blk.{layer}.ffn_up_exps.weight", "", "").single
        'blk.{layer}.ffn_up.{expert}.weight'
        """
        return self.gguf.replace("_exps.weight", ".{expert}.weight")


def row(gguf: str, hf: str, transform: Chooser = identity, *, required: bool = True) -> WeightName:
    """Return a row for a tensor outside the layers; ``hf`` follows ``{base}``."""
    return WeightName(gguf, "{base}" + hf, transform, required)


def layer(
    gguf: str,
    hf: str,
    transform: Chooser = identity,
    *,
    path: str = "layers",
    required: bool = True,
) -> WeightName:
    """Return a row for the weight of a module in each layer, by both modules' names."""
    return WeightName(
        f"blk.{{layer}}.{gguf}.weight",
        f"{{base}}{path}.{{layer}}.{hf}.weight",
        transform,
        required,
    )


def bias(weight: WeightName, *, required: bool = False) -> WeightName:
    """Return the row of the bias that belongs to a weight; a bias is never transposed."""
    transform = identity if weight.transform is conv1d else weight.transform
    return WeightName(
        weight.gguf.removesuffix("weight") + "bias",
        weight.hf.removesuffix("weight") + "bias",
        transform,
        required,
    )
