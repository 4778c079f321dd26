"""MXFP4 checkpoints of gpt-oss.

Format: OCP Microscaling Formats 1.0, blocks of 32 values E2M1 with one scale E8M0. A parameter
``P`` of shape (experts, in, out) lies on the disk as ``P_blocks``, U8 (experts, out, in / 32, 16),
two codes a byte, the first in the low nibble, and ``P_scales``, U8 (experts, out, in / 32):
value = level · 2^(scale − 127). bfloat16 holds every such value exactly.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy

from loraformat.errors import InputError, UnsupportedError, printable
from loraformat.families.table import model_type
from loraformat.model import config_json
from loraformat.model.checkpoint import Checkpoint, DenseTensor, LazyTensor
from loraformat.model.packed_weights import MXFP4
from loraformat.model.quantization_method import QuantizationMethod, QuantizedWeight
from loraformat.shards.quantized import quantized_format
from loraformat.tensors.arrays import Array, array_view
from loraformat.tensors.packed_codes import e2m1

__all__ = ["CONVERTER", "METHOD"]

_BLOCKS, _SCALES = "_blocks", "_scales"
_BLOCK = 32


def _weights(stored: Checkpoint) -> Iterator[QuantizedWeight]:
    named = model_type(config_json.parse(stored.config)) if stored.config else None
    if named != "gpt_oss":
        raise UnsupportedError(
            f"holds MXFP4 weights of a model of type {printable(named)}, and only those of "
            "gpt_oss can be read",
            path=stored.path,
            hint="start from the original, unquantized model, if it was published",
        )
    for name, tensor in stored.tensors.items():
        if name.endswith(_BLOCKS) and isinstance(tensor, DenseTensor):
            parameter = name.removesuffix(_BLOCKS)
            yield _weight(parameter, tensor, stored.tensors.get(parameter + _SCALES), stored.path)


def _weight(
    name: str, blocks: DenseTensor, scales: LazyTensor | None, path: Path
) -> QuantizedWeight:
    shape = blocks.shape
    fits = blocks.dtype == "U8" and len(shape) == 4 and shape[3] == _BLOCK // 2
    if not (
        isinstance(scales, DenseTensor)
        and fits
        and scales.dtype in ("U8", "F8_E8M0")
        and scales.shape == shape[:3]
    ):
        said = "no scales" if scales is None else f"scales {scales.dtype} {list(scales.shape)}"
        raise InputError(
            f"tensor {printable(blocks.name)} is {blocks.dtype} {list(shape)} with {said}, wanted "
            "U8 (experts, out, in / 32, 16) and U8 or F8_E8M0 (experts, out, in / 32)",
            path=path,
            hint="download the checkpoint again",
        )
    experts, out, groups, _ = shape
    height = groups * _BLOCK

    def rows(start: int, stop: int) -> Array:
        codes, exponents = blocks.array(), array_view(scales.load(), "F8_E8M0", scales.shape)
        result = numpy.empty((stop - start, out), numpy.float32)
        for expert in range(start // height, -(-stop // height)):
            first, last = max(start - expert * height, 0), min(stop - expert * height, height)
            some = slice(first // _BLOCK, -(-last // _BLOCK))
            values = e2m1(codes[expert, :, some])
            values *= exponents[expert, :, some, None].astype(numpy.float32)
            offset = expert * height
            result[offset + first - start : offset + last - start] = values.reshape(out, -1).T[
                first - some.start * _BLOCK : last - some.start * _BLOCK
            ]
        return result

    return QuantizedWeight(name, (experts, height, out), (blocks, scales), MXFP4, rows)


METHOD = QuantizationMethod(MXFP4, _weights)
CONVERTER = quantized_format(
    METHOD, "MXFP4 checkpoint of gpt-oss: experts in 4-bit blocks, decoded to bfloat16 exactly"
)
