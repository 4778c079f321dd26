"""float8 checkpoints: 8-bit floating-point weights with scales.

Published by DeepSeek, Qwen, Meta, Mistral and others, and made by compressed-tensors, FBGEMM and
transformers. Beside a weight ``W`` of type E4M3 or E5M2 stands ``W_scale_inv`` (DeepSeek's name)
or ``W_scale``, one number for the tensor, for each output feature, or for each block; either is
multiplied: W = scale · code. DeepSeek-V4 calls it ``scale`` and Mistral ``qscale_weight``, beside
``weight``. It may be a power of two of type E8M0 (UE8M0), stored as such or as bytes; so are those
of MXFP8, one for 32 values of a row (OCP Microscaling Formats 1.0). Scales of activations belong to
float8 arithmetic and stay behind.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy

from loraformat.errors import InputError, UnsupportedError, printable
from loraformat.model.checkpoint import Checkpoint, DenseTensor
from loraformat.model.packed_weights import FLOAT8
from loraformat.model.quantization_method import QuantizationMethod, QuantizedWeight
from loraformat.shards.quantized import quantized_format
from loraformat.tensors.arrays import Array, array_view, numpy_dtype

__all__ = ["CONVERTER", "METHOD"]

#: The numbers of the 256 codes.
_VALUES = {
    dtype: numpy.arange(256, dtype=numpy.uint8).view(numpy_dtype(dtype)).astype(numpy.float32)
    for dtype in ("F8_E4M3", "F8_E5M2")
}
_SCALES = ("_scale_inv", "_scale")
#: In the place of ``weight``.
_SCALES_BESIDE = ("scale", "qscale_weight")
_ACTIVATIONS = re.compile(
    r"\.((input|output|activation|k|v|q|kv)_scale(_ub)?|qscale_act)$|_proj_input_scale$"
)
_USUAL_BLOCK = (128, 128)
_MX_BLOCK = (1, 32)
#: Types of scales: numbers, and exponents of two.
_NUMBERS, _EXPONENTS = ("F32", "BF16", "F16"), ("F8_E8M0", "U8")


def _weights(stored: Checkpoint) -> Iterator[QuantizedWeight]:
    block = _block_size(stored)
    codes = {
        name: tensor for name, tensor in stored.tensors.items()
        if isinstance(tensor, DenseTensor) and tensor.dtype in _VALUES
        and not _ACTIVATIONS.search(name)
    }  # fmt: skip
    bare = set()
    for name, tensor in codes.items():
        found = [stored.tensors[scale] for scale in _scale_names(name) if scale in stored.tensors]
        if len(found) > 1:
            raise InputError("a weight in it has two scales", path=stored.path)
        scale = next((one for one in found if isinstance(one, DenseTensor)), None)
        if scale is None:
            bare.add(name)
        yield _weight(tensor, scale, block, stored.path)
    _refuse_unknown_scales(stored, bare)


def _scale_names(weight: str) -> list[str]:
    """Return the names that the scale of a weight may have."""
    beside = weight.removesuffix("weight")
    others = [beside + name for name in _SCALES_BESIDE] if beside != weight else []
    return [*(weight + suffix for suffix in _SCALES), *others]


def _refuse_unknown_scales(stored: Checkpoint, bare: set[str]) -> None:
    """Refuse codes without a scale that is known, but with one by another name beside them."""
    owners = {name.removesuffix("weight").rstrip(".") for name in bare}
    for name in stored.tensors:
        if "scale" not in name.rpartition(".")[2] or _ACTIVATIONS.search(name):
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


def _block_size(stored: Checkpoint) -> tuple[int, int]:
    """Return rows and columns of a block, by the config, or DeepSeek's."""
    value = (stored.quantization_config or {}).get("weight_block_size") or _USUAL_BLOCK
    if (
        not isinstance(value, list | tuple)
        or len(value) != 2
        or not all(type(size) is int and 0 < size <= 1 << 20 for size in value)
    ):
        raise InputError(
            f"weight_block_size is {printable(value)}, wanted two sizes", path=stored.path
        )
    return value[0], value[1]


def _weight(
    codes: DenseTensor, scale: DenseTensor | None, block: tuple[int, int], path: Path
) -> QuantizedWeight:
    stored_as = f"float8 {codes.dtype.removeprefix('F8_')}"
    table = _VALUES[codes.dtype]

    def plain(start: int, stop: int) -> Array:
        return table.take(codes.rows(start, stop).view(numpy.uint8))

    if scale is None:
        return QuantizedWeight(codes.name, codes.shape, (codes,), stored_as, plain)
    few = (1,) * (2 - len(codes.shape))  # a vector is a matrix of one row
    shape, own = few + codes.shape, few + _aligned(scale.shape, codes.shape)
    repeats = _repeats(scale.dtype, own, shape, block)
    if repeats is None:
        raise InputError(
            f"tensor {printable(scale.name)} is {scale.dtype} {list(scale.shape)}, which scales no "
            f"weight of shape {list(codes.shape)} in blocks of {block[0]} x {block[1]}",
            path=path,
            hint="download the checkpoint again, with the config.json that belongs to it",
        )
    exponents = scale.dtype in _EXPONENTS

    def rows(start: int, stop: int) -> Array:
        factors = array_view(scale.load(), "F8_E8M0" if exponents else scale.dtype, own)
        # Where the scales of each row are; along a dimension of size 1 all rows share them.
        places = numpy.unravel_index(numpy.arange(start, stop), shape[:-1])
        sizes = zip(places, repeats[:-1], own[:-1], strict=True)
        at = tuple(place // repeat * (size > 1) for place, repeat, size in sizes)
        scales = factors[at].astype(numpy.float32)
        if own[-1] > 1:
            scales = scales.repeat(repeats[-1], axis=1)[:, : shape[-1]]
        values = plain(start, stop)
        return numpy.multiply(values, scales, out=values)

    return QuantizedWeight(codes.name, codes.shape, (codes, scale), stored_as, rows)


def _aligned(scale: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return a scale's shape with as many dimensions as the weight's."""
    if scale in ((), (1,)):
        return (1,) * len(shape)
    if len(scale) == 1 and len(shape) == 2:  # one for each output feature
        return (*scale, 1)
    return scale


def _repeats(
    dtype: str, own: tuple[int, ...], shape: tuple[int, ...], block: tuple[int, int]
) -> tuple[int, ...] | None:
    """Return how many elements share a scale, along each dimension; None if the shapes misfit."""
    if len(own) != len(shape) or dtype not in _NUMBERS + _EXPONENTS:
        return None
    for sizes in (block, _MX_BLOCK) if dtype in _EXPONENTS else (block,):
        found = []
        for count, scales, size in zip(shape, own, (1,) * (len(shape) - 2) + sizes, strict=True):
            if scales not in (1, count, -(-count // size)):
                break
            found.append(1 if scales in (1, count) else size)
        else:
            return tuple(found)
    return None


METHOD = QuantizationMethod(
    FLOAT8,
    _weights,
    dropped=_ACTIVATIONS,
    dropped_what="scales of activations (they are for float8 arithmetic)",
)
CONVERTER = quantized_format(
    METHOD, "float8 checkpoint: E4M3 or E5M2 with scales by tensor, row or block"
)
