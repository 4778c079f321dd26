"""Weights whose codes are floats of 8 or 4 bits, as checkpoints of several methods hold them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy

from loraformat.errors import InputError, printable
from loraformat.model.block_numbers import BlockNumbers, scaled
from loraformat.model.checkpoint import DenseTensor
from loraformat.model.quantization_method import DAMAGED, QuantizedWeight
from loraformat.tensors.arrays import Array, numpy_dtype
from loraformat.tensors.packed_codes import e2m1

__all__ = ["ACTIVATIONS", "ACTIVATIONS_WHAT", "FLOAT8_VALUES", "block_size",
           "float4_weight", "float8_weight"]  # fmt: skip

#: The numbers of the 256 codes.
FLOAT8_VALUES = {
    dtype: numpy.arange(256, dtype=numpy.uint8).view(numpy_dtype(dtype)).astype(numpy.float32)
    for dtype in ("F8_E4M3", "F8_E5M2")
}
#: What a model that computes in few bits knows of its activations.
ACTIVATIONS = re.compile(
    r"\.((input|output|activation|k|v|q|kv)_(scale(_ub)?|zero_point|global_scale)|qscale_act)$"
    r"|_proj_input_scale$|\.[kv]_proj\.[kv]_bias$"
)
ACTIVATIONS_WHAT = "scales of activations (they are for arithmetic in few bits)"
_USUAL_BLOCK = (128, 128)
#: Values that share a scale in NVFP4, whose scales are float8, and MXFP4, whose are exponents.
_FLOAT4_GROUPS = {"F8_E4M3": 16, "U8": 32, "F8_E8M0": 32}


def block_size(settings: Mapping[str, Any] | None, path: Path) -> tuple[int, int]:
    """Return rows and columns of a float8 block, by the config's settings, or DeepSeek's."""
    value = (settings or {}).get("weight_block_size") or _USUAL_BLOCK
    if (
        not isinstance(value, list | tuple)
        or len(value) != 2
        or not all(type(size) is int and 0 < size <= 1 << 20 for size in value)
    ):
        raise InputError(
            f"weight_block_size is {printable(value)}, wanted two sizes", path=path, hint=DAMAGED
        )
    return value[0], value[1]


def float8_weight(
    codes: DenseTensor, scale: DenseTensor | None, block: tuple[int, int], path: Path
) -> QuantizedWeight:
    """Return a weight in E4M3 or E5M2; without a scale, its codes are its numbers."""
    stored_as = f"float8 {codes.dtype.removeprefix('F8_')}"
    table = FLOAT8_VALUES[codes.dtype]

    def numbers(start: int, stop: int) -> Array:
        return table.take(codes.rows(start, stop).view(numpy.uint8))

    if scale is None:
        return QuantizedWeight(codes.name, codes.shape, (codes,), stored_as, numbers)
    rows = scaled(numbers, BlockNumbers.scales(scale, codes.shape, block, path).rows)
    return QuantizedWeight(codes.name, codes.shape, (codes, scale), stored_as, rows)


def float4_weight(
    name: str,
    codes: DenseTensor,
    scale: DenseTensor,
    second: DenseTensor | None,
    combined: Callable[[Array, Array], Array],
    path: Path,
) -> QuantizedWeight:
    """Return a weight in E2M1, two codes in a byte: NVFP4, or MXFP4, which has no second scale.

    Parameters
    ----------
    name : str
    codes, scale, second : DenseTensor
        (..., columns / 2), (..., columns / 16 or 32), and a single number.
    combined : callable
        Computes the scale of a group from its own and the second, float32.
    path : Path
        For errors.
    """
    group = _FLOAT4_GROUPS.get(scale.dtype)
    shape = (*codes.shape[:-1], 2 * codes.shape[-1]) if codes.shape else ()
    seconds = None if second is None else (second.dtype, second.count)
    if (
        group is None
        or not shape
        or codes.dtype not in ("U8", "I8")
        or shape[-1] % group
        or scale.shape != (*shape[:-1], shape[-1] // group)
        or seconds != (("F32", 1) if group == 16 else None)
    ):
        also = "" if second is None else f" and {second.dtype} {list(second.shape)}"
        raise InputError(
            f"tensor {printable(codes.name)} is {codes.dtype} {list(codes.shape)} with scales "
            f"{scale.dtype} {list(scale.shape)}{also}, wanted U8 (..., columns / 2) with F8_E4M3 "
            "(..., columns / 16) and one F32 (NVFP4), or with U8 (..., columns / 32) (MXFP4)",
            path=path,
            hint=DAMAGED,
        )
    dtype = numpy_dtype("F8_E4M3" if group == 16 else "F8_E8M0")

    def factors(start: int, stop: int) -> Array:
        found = scale.rows(start, stop).view(dtype).astype(numpy.float32)
        return found if second is None else combined(found, second.array().reshape(()))

    rows = scaled(lambda start, stop: e2m1(codes.rows(start, stop).view(numpy.uint8)), factors)
    parts = (codes, scale) if second is None else (codes, scale, second)
    return QuantizedWeight(name, shape, parts, "NVFP4" if group == 16 else "MXFP4", rows)
