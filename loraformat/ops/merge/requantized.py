"""Quantizing a merged weight again, and measuring what that leaves of the delta."""

from __future__ import annotations

from dataclasses import replace

from loraformat.model.checkpoint import DenseTensor, LazyTensor, NF4Parts, NF4Tensor
from loraformat.ops.encoding.encode import QuantizationPolicy, quantized
from loraformat.ops.merge.retention import Meter

__all__ = ["requantized"]


def requantized(
    merged: DenseTensor,
    source: LazyTensor,
    block_size: int,
    double_quant: bool,
    transposed: bool,
    meter: Meter,
) -> NF4Tensor:
    """Return a merged weight in NF4.

    Parameters
    ----------
    merged : DenseTensor
    source : LazyTensor
        The weight before.
    block_size, double_quant, transposed
        As in `NF4Tensor`.
    meter : Meter
        Takes what is left of the delta.
    """
    policy = QuantizationPolicy(block_size, double_quant)
    model_type = "gpt2" if transposed else None
    again = quantized(merged, policy, model_type)

    def load() -> NF4Parts:
        data = merged.load()
        fixed = replace(merged, load=lambda: data)
        parts = quantized(fixed, policy, model_type).load()
        result = replace(again, load=lambda: parts).dequantize("F32")
        before = source.dequantize("F32") if isinstance(source, NF4Tensor) else source.torch()
        meter.compare(merged.name, before, fixed.torch(), result)
        return parts

    return replace(again, load=load)
