"""Rows that map Hugging Face tensor names to GGUF tensor names, with the shape in GGUF.

In a template ``{base}`` stands for what precedes the layers (``model.``, or whatever the
checkpoint has), ``{layer}`` and ``{expert}`` for numbers. A shape names sizes of the model
(`sizes`), ``"queries hidden"`` for example, and ``*`` is any.
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
    "Chooser", "ExpertWeightName", "Sizes", "WeightName", "bias", "conv1d", "expert_weights",
    "identity", "key_heads", "layer", "plus_one", "query_heads", "row", "sizes", "with_biases",
]  # fmt: skip

Sizes = tuple[int | None, ...]
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


def sizes(shape: str, config: Config) -> Sizes:
    """Return a shape in numbers; None is any."""
    return tuple(None if size == "*" else _SIZES[size](config) for size in shape.split())


_SIZES: dict[str, Callable[[Config], int]] = {
    "hidden": lambda config: config.hidden,
    "inner": lambda config: config.inner,
    "gate_up": lambda config: 2 * config.inner,
    "head_dim": lambda config: config.head_dim,
    "queries": lambda config: config.heads * config.head_dim,
    "keys": lambda config: config.kv_heads * config.head_dim,
    "qkv": lambda config: (config.heads + 2 * config.kv_heads) * config.head_dim,
    "experts": lambda config: config.experts,
    "expert_inner": lambda config: config.integer("moe_intermediate_size"),
}


@dataclass(frozen=True, slots=True)
class WeightName:
    """One tensor here, one tensor there.

    Attributes
    ----------
    gguf : str
        Template of the GGUF name.
    hf : str
        Template of the Hugging Face name.
    shape : str
        In GGUF, as numpy counts.
    transform : callable
        Chooses the transform from Hugging Face to GGUF.
    required : bool
        Whether every model has it.
    """

    gguf: str
    hf: str
    shape: str
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
    shape : str
        In GGUF.
    fused : str
        Template of the parameter that holds them in memory since transformers 5.
    half : int or None
        Which half of the rows of each matrix of that parameter; None for all of them.
    """

    gguf: str
    hf: str
    shape: str
    fused: str
    half: int | None = None

    @property
    def single(self) -> str:
        """Template with ``{expert}`` of the tensors that llama.cpp wrote before April 2024.

        Examples
        --------
        >>> ExpertWeightName("blk.{layer}.ffn_up_exps.weight", "", "", "").single
        'blk.{layer}.ffn_up.{expert}.weight'
        """
        return self.gguf.replace("_exps.weight", ".{expert}.weight")


def row(
    gguf: str, hf: str, shape: str, transform: Chooser = identity, *, required: bool = True
) -> WeightName:
    """Return a row for a tensor outside the layers; ``hf`` follows ``{base}``."""
    return WeightName(gguf, "{base}" + hf, shape, transform, required)


def layer(
    gguf: str,
    hf: str,
    shape: str = "hidden",
    transform: Chooser = identity,
    *,
    path: str = "layers",
) -> WeightName:
    """Return a row for the weight of a module in each layer, by both modules' names."""
    name = f"{{base}}{path}.{{layer}}.{hf}.weight"
    return WeightName(f"blk.{{layer}}.{gguf}.weight", name, shape, transform)


def bias(weight: WeightName, *, required: bool = False) -> WeightName:
    """Return the row of the bias that belongs to a weight; a bias is never transposed."""
    return WeightName(
        weight.gguf.removesuffix("weight") + "bias",
        weight.hf.removesuffix("weight") + "bias",
        weight.shape.split()[0],
        identity if weight.transform is conv1d else weight.transform,
        required,
    )


def with_biases(*weights: WeightName, required: bool = False) -> tuple[WeightName, ...]:
    """Return rows of weights with those of their biases."""
    return tuple(one for w in weights for one in (w, bias(w, required=required)))


def expert_weights(
    path: str, gate: str, up: str, down: str
) -> tuple[WeightName | ExpertWeightName, ...]:
    """Return rows of a router and its experts, by their module in a layer and its projections."""
    one, fused = f"{path}.experts.{{expert}}", "{base}layers.{layer}.mlp.experts"

    def stacked(gguf: str, hf: str, shape: str, fused: str, half: int | None) -> ExpertWeightName:
        named = layer(f"ffn_{gguf}_exps", f"{one}.{hf}", f"experts {shape}")
        return ExpertWeightName(named.gguf, named.hf, named.shape, fused, half)

    return (
        layer("ffn_gate_inp", f"{path}.gate", "experts hidden"),
        stacked("gate", gate, "expert_inner hidden", f"{fused}.gate_up_proj", 0),
        stacked("up", up, "expert_inner hidden", f"{fused}.gate_up_proj", 1),
        stacked("down", down, "hidden expert_inner", f"{fused}.down_proj", None),
    )
