"""float8 checkpoints: 8-bit floating-point weights with scales.

Published by DeepSeek, Qwen, Meta, Mistral and others, and made by compressed-tensors, FBGEMM and
transformers. Beside a weight ``W`` of type E4M3 or E5M2 stands ``W_scale_inv`` (DeepSeek's name)
or ``W_scale``, one number for the tensor, for each output feature, or for each block; either is
multiplied: W = scale · code. DeepSeek-V4 calls it ``scale`` and Mistral ``qscale_weight``, beside
``weight``. It may be a power of two of type E8M0 (UE8M0), stored as such or as bytes; so are those
of MXFP8, one for 32 values of a row (OCP Microscaling Formats 1.0). Experts of DeepSeek-V4 are
MXFP4: two codes E2M1 in a byte of type I8, with ``scale`` for 32. Scales of activations belong to
float8 arithmetic and stay behind.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy

from loraformat.errors import InputError, UnsupportedError, printable
from loraformat.model.checkpoint import Checkpoint, DenseTensor
from loraformat.model.float_codes import (
    ACTIVATIONS,
    ACTIVATIONS_WHAT,
    FLOAT8_VALUES,
    block_size,
    float4_weight,
    float8_weight,
)
from loraformat.model.packed_weights import FLOAT8
from loraformat.model.quantization_method import QuantizationMethod, QuantizedWeight
from loraformat.shards.quantized import quantized_format

__all__ = ["CONVERTER", "METHOD"]

_SCALES = ("_scale_inv", "_scale")
#: In the place of ``weight``.
_SCALES_BESIDE = ("scale", "qscale_weight")


def _weights(stored: Checkpoint) -> Iterator[QuantizedWeight]:
    block = block_size(stored.quantization_config, stored.path)
    codes = {
        name: tensor for name, tensor in stored.tensors.items()
        if isinstance(tensor, DenseTensor) and tensor.dtype in FLOAT8_VALUES
        and not ACTIVATIONS.search(name)
    }  # fmt: skip
    bare = set()
    for name, tensor in codes.items():
        found = [stored.tensors[scale] for scale in _scale_names(name) if scale in stored.tensors]
        if len(found) > 1:
            raise InputError("a weight in it has two scales", path=stored.path)
        scale = next((one for one in found if isinstance(one, DenseTensor)), None)
        if scale is None:
            bare.add(name)
        yield float8_weight(tensor, scale, block, stored.path)
    yield from _float4_weights(stored)
    _refuse_unknown_scales(stored, bare)


def _float4_weights(stored: Checkpoint) -> Iterator[QuantizedWeight]:
    for name, codes in stored.tensors.items():
        if name.endswith(".weight") and isinstance(codes, DenseTensor) and codes.dtype == "I8":
            scale = stored.tensors.get(name.removesuffix("weight") + "scale")
            if isinstance(scale, DenseTensor):
                yield float4_weight(name, codes, scale, None, numpy.multiply, stored.path)


def _scale_names(weight: str) -> list[str]:
    """Return the names that the scale of a weight may have."""
    beside = weight.removesuffix("weight")
    others = [beside + name for name in _SCALES_BESIDE] if beside != weight else []
    return [*(weight + suffix for suffix in _SCALES), *others]


def _refuse_unknown_scales(stored: Checkpoint, bare: set[str]) -> None:
    """Refuse codes without a scale that is known, but with one by another name beside them."""
    owners = {name.removesuffix("weight").rstrip(".") for name in bare}
    for name in stored.tensors:
        if "scale" not in name.rpartition(".")[2] or ACTIVATIONS.search(name):
            continue
        if name.rpartition(".")[0] in owners or any(
            name[:at] in bare for at, sign in enumerate(name) if sign == "_"
        ):
            raise UnsupportedError(
                f"tensor {printable(name)} scales float8 weights in a way that is not supported",
                path=stored.path,
                hint="start from the original, unquantized model, or export bfloat16 with the "
                "program that wrote it",
            )


METHOD = QuantizationMethod(
    FLOAT8,
    _weights,
    dropped=ACTIVATIONS,
    dropped_what=ACTIVATIONS_WHAT,
)
CONVERTER = quantized_format(
    METHOD, "float8 checkpoint: E4M3 or E5M2 with scales by tensor, row or block"
)
