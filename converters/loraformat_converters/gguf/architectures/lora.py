"""Mapping of LoRA deltas between Hugging Face modules and GGUF tensors.

PEFT's B (out, r) and A (r, in) of a linear are GGUF's ``lora_b`` and ``lora_a`` of one tensor,
but for the order or the share of B's rows. Columns of A never change: no architecture here
transforms the columns of a weight.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from loraformat.families.expert_names import spelled_in_memory, spelled_on_disk
from loraformat.tensors.arrays import Array
from loraformat_converters.gguf.architectures.config import Config
from loraformat_converters.gguf.architectures.record import Architecture
from loraformat_converters.gguf.architectures.transforms import IDENTITY, Transform
from loraformat_converters.gguf.architectures.weights import ExpertWeightName, WeightName, conv1d

__all__ = ["LoraTarget", "lora_module", "lora_places"]


@dataclass(frozen=True, slots=True)
class LoraTarget:
    """A GGUF tensor, and which rows of a module's B belong to it.

    Attributes
    ----------
    module : str
        The Hugging Face module, or, for experts, the parameter.
    tensor : str
        The GGUF weight, for example ``blk.0.attn_q.weight``.
    rows : Transform
        Order of the rows of B: `IDENTITY` or `HeadOrder`, from Hugging Face to GGUF.
    half : int or None
        B's rows are two halves, and this one belongs here (gate and up of fused experts).
    experts : int
        Of a tensor with three dimensions; 0 for a matrix.
    expert : int or None
        The delta belongs to this one of them only.
    embedding : bool
        The delta is that of an embedding: GGUF wants A as (vocabulary, r).
    transposed : bool
        Hugging Face stores the weight as (in, out): embeddings and ``Conv1D``.
    """

    module: str
    tensor: str
    rows: Transform = IDENTITY
    half: int | None = None
    experts: int = 0
    expert: int | None = None
    embedding: bool = False
    transposed: bool = field(default=False, repr=False)

    def to_gguf(self, b: Array) -> Array:
        """Return what is B here: (…, out, r) to (…, out or half of it, r)."""
        if self.half is not None:
            rows = b.shape[-2] // 2
            b = b[..., self.half * rows : (self.half + 1) * rows, :]
        return b if self.rows is IDENTITY else self.rows.rows(b, 0, b.shape[0])

    def to_huggingface(self, b: Array) -> Array:
        """Return B in the module's order; a half stays one."""
        return b if self.rows is IDENTITY else self.rows.inverse.rows(b, 0, b.shape[0])


def lora_places(architecture: Architecture, config: Config, module: str) -> list[LoraTarget]:
    """Return where the delta of a module goes: nowhere if llama.cpp has no such weight.

    Modules are named as PEFT does, without ``base_model.model.``, fused experts by their parameter:
    ``model.layers.0.mlp.experts.gate_up_proj``. Of a tied model the head has no place.
    """
    for base in sorted(architecture.bases, key=len, reverse=True):
        inner = module.removeprefix(base)
        if base and inner == module and not module.startswith("lm_head"):
            continue
        if found := _places(architecture, config, inner, module):
            return found
    return []


def _places(
    architecture: Architecture, config: Config, inner: str, module: str
) -> list[LoraTarget]:
    found = []
    number = _layer(inner)
    if number is not None and number >= config.layers:
        return []
    for row in architecture.rows(config):
        if isinstance(row, ExpertWeightName):
            found += _expert_places(row, config, inner, module, number)
        elif row.hf.format(base="", layer=number) in _weights(inner):
            found.append(_place(row, config, module, number))
    head = architecture.head
    if head is not None and not config.tied and module.endswith("lm_head"):
        found.append(LoraTarget(module, head.gguf))
    return found


def _layer(name: str) -> int | None:
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


def _weights(inner: str) -> tuple[str, str]:
    """Names that a module's weight may have in a file; see mixtral in transformers 5."""
    return f"{inner}.weight", f"{spelled_on_disk(inner)}.weight"


def _place(row: WeightName, config: Config, module: str, number: int | None) -> LoraTarget:
    # PEFT's factors of a Conv1D are those of the linear that it computes.
    turned = row.transform is conv1d
    rows = IDENTITY if turned else row.transform(config)
    tensor = row.gguf.format(layer=number)
    embedding = tensor == "token_embd.weight"
    return LoraTarget(module, tensor, rows, embedding=embedding, transposed=embedding or turned)


def _expert_places(
    row: ExpertWeightName, config: Config, inner: str, module: str, number: int | None
) -> list[LoraTarget]:
    tensor = row.gguf.format(layer=number)
    if inner == row.fused.format(base="", layer=number):
        return [LoraTarget(module, tensor, half=row.half, experts=config.experts)]
    for expert in range(config.experts):
        if row.hf.format(base="", layer=number, expert=expert) == f"{inner}.weight":
            return [LoraTarget(module, tensor, experts=config.experts, expert=expert)]
    return []


def lora_module(architecture: Architecture, config: Config, tensor: str) -> LoraTarget | None:
    """Return the module that a GGUF weight's delta belongs to, None if there is none.

    The module is named as transformers does in memory; of experts it is the parameter.
    """
    base, number = architecture.base_of(config), _layer(tensor)
    if number is not None and number >= config.layers:
        return None
    if architecture.head is not None and tensor == architecture.head.gguf:
        return None if config.tied else LoraTarget("lm_head", tensor)
    for row in architecture.rows(config):
        if row.gguf.format(layer=number) != tensor:
            continue
        if isinstance(row, ExpertWeightName):
            module = row.fused.format(base=base, layer=number)
            return LoraTarget(module, tensor, half=row.half, experts=config.experts)
        name = row.hf.format(base=base, layer=number).removesuffix(".weight")
        return _place(row, config, spelled_in_memory(name), number)
    return None
