"""Registers loraformat with transformers, which then opens bundles with experts in NF4.

bitsandbytes has no module for the stacks of experts that transformers 5 makes, so a bundle with
such weights names a quantizer of its own. It is registered by::

    import loraformat.transformers

Then ``AutoModelForCausalLM.from_pretrained(bundle)`` opens it: linears become those of
bitsandbytes, and stacks of experts stay in 4 bits and are decoded when they are computed with, one
expert at a time with ``experts_implementation="eager"``. PEFT's adapters, ``target_parameters``
included, work on top. Autograd keeps decoded experts until the backward pass: train with gradient
checkpointing, or with ``loraformat train``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.utils.quantization_config import BitsAndBytesConfig

from loraformat.errors import UnsupportedError
from loraformat.model.architecture import is_expert_stack
from loraformat.model.nf4_parts import NF4_PARTS, SEGMENT_METHOD, SEGMENT_PARTS
from loraformat.nf4 import codec
from loraformat.nf4.quant_state import QuantState, parse_quant_state
from loraformat.nf4.segments import NF4Stack
from loraformat.tensors.torch_arrays import array_of

__all__ = ["LoraformatConfig", "LoraformatQuantizer", "NF4Experts"]

_SUFFIXES = tuple(SEGMENT_PARTS.values())
#: Parts that a segment is decoded from.
_SEGMENT = ("", *(SEGMENT_PARTS[part] for part in ("absmax", "nested_absmax", "nested_offset")))


@register_quantization_config(SEGMENT_METHOD)
class LoraformatConfig(BitsAndBytesConfig):  # type: ignore[misc]
    """What ``config.json`` of a bundle with segments says: the members of bitsandbytes' config."""

    def __init__(self, **members: Any) -> None:
        kept = {key: value for key, value in members.items() if "load_in_" not in key}
        kept.pop("quant_method", None)
        super().__init__(load_in_4bit=True, **kept)
        self.quant_method = SEGMENT_METHOD

    def to_dict(self) -> dict[str, Any]:
        """Return the members as a bundle's ``config.json`` has them."""
        members: dict[str, Any] = super().to_dict()
        return {key: value for key, value in members.items() if "load_in_" not in key}


class NF4Experts(torch.Tensor):
    """A stack of experts in NF4: to torch an ordinary tensor, decoded when it is computed with.

    One expert alone is decoded where one alone is asked for, ``stack[expert]``. It cannot be
    changed in place.

    Parameters
    ----------
    state : QuantState
        Names the segments.
    parts : dict of str to torch.Tensor
        Codes, scales, second-level scales and offsets, by name suffix.
    dtype : torch.dtype
        Of the decoded numbers: float32, float16 or bfloat16.
    """

    state: QuantState
    parts: dict[str, torch.Tensor]

    @staticmethod
    def __new__(
        cls, state: QuantState, parts: dict[str, torch.Tensor], dtype: torch.dtype
    ) -> NF4Experts:
        """Return a tensor that has the shape of the weight, and the codes for its numbers."""
        make: Any = torch.Tensor._make_wrapper_subclass
        stack: NF4Experts = make(cls, state.shape, dtype=dtype, device=parts[""].device)
        stack.state, stack.parts = state, parts
        return stack

    def __repr__(self, **how: Any) -> str:  # type: ignore[override]
        return f"NF4Experts({tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    def decoded(self, first: int = 0, last: int | None = None) -> torch.Tensor:
        """Return some matrices as ordinary numbers, of the shape (matrices, rows, columns)."""
        last = len(self) if last is None else last
        each = len(self.parts[""]) // len(self)  # segments of a matrix
        shape = (last - first, *self.state.shape[1:])
        out = torch.empty(shape, dtype=self.dtype, device=self.device)
        segments = range(first * each, last * each)
        for number, row in zip(segments, out.view(-1, self.state.count), strict=True):
            if self.device.type == "cpu":
                codec.dequantize(self._codes(number), out=array_of(row))
            else:
                row.copy_(self.formula(number))
        return out

    def _codes(self, number: int) -> codec.NF4:
        codes, scales, nested, offset = (
            None if suffix not in self.parts else array_of(self.parts[suffix][number : number + 1])
            for suffix in _SEGMENT
        )
        assert codes is not None and scales is not None
        size = self.state.count, self.state.block_size
        (segment,) = NF4Stack(codes, scales, *size, nested, offset).segments()
        return segment

    def formula(self, number: int) -> torch.Tensor:
        """Decode a segment where the codec's kernels do not run, to the same bits: float32."""
        codes, scales, nested, offset = (
            self.parts[suffix][number] if suffix in self.parts else None for suffix in _SEGMENT
        )
        assert codes is not None and scales is not None
        if nested is not None and offset is not None:
            table = torch.from_numpy(codec.nested_map()).to(codes.device)
            wide = nested.repeat_interleave(codec.NESTED_BLOCK_SIZE)[: len(scales)]
            scales = table[scales.long()] * wide + offset
        pairs = torch.stack((codes >> 4, codes & 15), dim=1).view(-1)[: self.state.count]
        levels = torch.from_numpy(codec.levels()).to(codes.device)
        blocks = scales.repeat_interleave(self.state.block_size)[: self.state.count]
        return levels[pairs.long()] * blocks

    def _like(self, device: torch.device | None = None) -> NF4Experts:
        parts = {suffix: part.to(device or part.device) for suffix, part in self.parts.items()}
        return NF4Experts(self.state, parts, self.dtype)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Decode what an operation computes with; carry the codes where it only moves them."""
        kwargs, aten = kwargs or {}, torch.ops.aten
        stack = args[0] if args and isinstance(args[0], cls) else None
        if stack is not None:
            if func in (aten.detach.default, aten.alias.default):
                return stack._like()
            if func is aten._to_copy.default and kwargs.get("dtype") in (None, stack.dtype):
                return stack._like(kwargs.get("device"))
            if func is aten.select.int and args[1] == 0:
                expert = range(len(stack))[args[2]]
                return stack.decoded(expert, expert + 1)[0]
            if func is aten.set_.source_Tensor and isinstance(args[1], cls):
                stack.state, stack.parts = args[1].state, args[1].parts
                return stack
            if func._schema.is_mutable:
                raise UnsupportedError(
                    "experts in 4 bits cannot be changed in place",
                    hint="merge an adapter into them with: loraformat merge BUNDLE ADAPTER OUTPUT",
                )
        plain = torch.utils._pytree.tree_map_only(cls, cls.decoded, (args, kwargs))
        return func(*plain[0], **plain[1])


class _Deserialize(ConversionOps):  # type: ignore[misc]
    """Makes a parameter of the stored parts of one weight."""

    def __init__(self, hf_quantizer: LoraformatQuantizer, leaf: str) -> None:
        self.hf_quantizer, self.leaf = hf_quantizer, leaf

    def convert(self, input_dict: dict[str, Any], **where: Any) -> dict[str, Any]:
        pattern = re.escape(self.leaf)
        parts = {key.removeprefix(pattern): _only(value) for key, value in input_dict.items()}
        raw = parts.get(NF4_PARTS["quant_state"])
        if raw is None:  # a dense tensor
            return input_dict
        state = parse_quant_state(bytes(raw.tolist()), str(where["full_layer_name"]), "")
        if state.segments is not None:
            dtype = where["model"].get_parameter(where["full_layer_name"]).dtype
            kept = {suffix: parts[suffix] for suffix in _SEGMENT if suffix in parts}
            return {self.leaf: torch.nn.Parameter(NF4Experts(state, kept, dtype), False)}
        linear = self.hf_quantizer.get_load_operations()["deserialize"](self.hf_quantizer)
        found: dict[str, Any] = linear.convert(
            {self.leaf + suffix: part for suffix, part in parts.items()}, **where
        )
        return found


def _only(value: Any) -> Any:
    return value[0] if isinstance(value, list) else value


@register_quantizer(SEGMENT_METHOD)
class LoraformatQuantizer(Bnb4BitHfQuantizer):  # type: ignore[misc]
    """Opens a bundle with segments: linears as bitsandbytes does, and stacks of experts."""

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """Add how the parts of a weight become a parameter, for linears and for each stack."""
        stacks = {"." + ".".join(name.split(".")[-2:]) for name in _stacks(model)}
        return weight_conversions + [
            WeightConverter(
                [re.escape(leaf) + suffix for suffix in _SUFFIXES], leaf, [_Deserialize(self, leaf)]
            )
            for leaf in (*sorted(stacks), "weight")  # the first that matches counts
        ]

    def is_serializable(self) -> bool:
        """Tell that ``save_pretrained`` cannot write the model: the bundle is its stored form."""
        return False


def _stacks(model: Any) -> Iterator[str]:
    for name, parameter in model.named_parameters():
        if parameter.ndim == 3 and is_expert_stack(name):
            yield name
