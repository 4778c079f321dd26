"""torchao checkpoints, as transformers saves them in safetensors: int8, int4 and float8 weights.

Format: torchao 0.18 (2026), ``torchao.prototype.safetensors``. A parameter ``m.weight`` is
stored as ``m._weight_qdata``, ``m._weight_scale`` and ``m._weight_zero_point``:

- ``Int8Tensor`` and ``IntxUnpackedToInt8Tensor``: I8 (out, in); W = scale · (code − zero), by
  tensor, output feature or group; zeros are optional.
- ``Int4Tensor``: I8 (out, in / 2), two signed codes in a byte, the first in the low nibble; scales
  and zeros (groups, out), the zeros numbers: W = scale · code + zero.
- ``Float8Tensor``: float8 (out, in), with scales.

Layouts of single kernels (``Int4TilePackedTo4dTensor``, ``Int4PlainInt32Tensor``) are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

import numpy

from loraformat.errors import InputError, UnsupportedError, printable
from loraformat.model.block_numbers import SCALE_TYPES, BlockNumbers, default_dtype, scaled
from loraformat.model.checkpoint import Checkpoint, DenseTensor
from loraformat.model.float_codes import FLOAT8_VALUES, block_size, float8_weight
from loraformat.model.packed_weights import ORIGINAL, TORCHAO
from loraformat.model.quantization_method import (
    DAMAGED,
    QuantizationMethod,
    QuantizedWeight,
    stored_part,
)
from loraformat.shards.quantized import quantized_format
from loraformat.tensors.arrays import Array
from loraformat.tensors.packed_codes import unpack

__all__ = ["CONVERTER", "METHOD"]

_CODES = re.compile(r"(?P<prefix>(?P<module>.+)\._(?P<parameter>\w+)_)qdata")
_ACTIVATIONS = re.compile(r"\._\w+_act_quant_(scale|zero_point)$")


def _weights(stored: Checkpoint) -> Iterator[QuantizedWeight]:
    for name, codes in stored.tensors.items():
        match = _CODES.fullmatch(name)
        if match and isinstance(codes, DenseTensor):
            weight = _weight(stored, codes, match["prefix"])
            yield replace(weight, name=f"{match['module']}.{match['parameter']}")


def _weight(stored: Checkpoint, codes: DenseTensor, prefix: str) -> QuantizedWeight:
    if codes.dtype not in ("I8", *FLOAT8_VALUES):
        raise UnsupportedError(
            f"tensor {printable(codes.name)} is {codes.dtype} {list(codes.shape)}, a layout of "
            "single kernels; of torchao only Int8Tensor, IntxUnpackedToInt8Tensor, Int4Tensor and "
            "Float8Tensor can be read",
            path=stored.path,
            hint=ORIGINAL,
        )
    scale = stored_part(stored, f"{prefix}scale", SCALE_TYPES)
    zero = None
    if f"{prefix}zero_point" in stored.tensors:
        zero = stored_part(stored, f"{prefix}zero_point", ("I8", "I32", *SCALE_TYPES), scale.shape)
    if codes.dtype in FLOAT8_VALUES:
        size = _block(codes, scale) or block_size(None, stored.path)
        return float8_weight(codes, scale, size, stored.path)
    if block := _block(codes, scale):
        return _integers(stored, codes, scale, zero, block)
    if zero is not None and zero.dtype in SCALE_TYPES:
        return _int4(stored, codes, scale, zero)
    raise _misfit(stored, codes, scale)


def _block(codes: DenseTensor, scale: DenseTensor) -> tuple[int, int] | None:
    """Return rows and columns that share a scale; None of scales in the order of ``Int4Tensor``."""
    if scale.count == 1:
        return (codes.shape[-2], codes.shape[-1]) if len(codes.shape) > 1 else None
    if len(scale.shape) != len(codes.shape) or scale.shape[:-1] != codes.shape[:-1]:
        return None
    return (1, codes.shape[-1] // scale.shape[-1]) if scale.shape[-1] else None


def _integers(
    stored: Checkpoint,
    codes: DenseTensor,
    scale: DenseTensor,
    zero: DenseTensor | None,
    block: tuple[int, int],
) -> QuantizedWeight:
    if not block[1] or codes.shape[-1] % block[1]:
        raise _misfit(stored, codes, scale)
    zeros = None if zero is None else BlockNumbers.of(zero, codes.shape, [block])
    rows = scaled(
        lambda start, stop: codes.rows(start, stop).astype(numpy.float32),
        BlockNumbers.scales(scale, codes.shape, block, stored.path).rows,
        None if zeros is None else zeros.rows,
    )
    parts = (codes, scale) if zero is None else (codes, scale, zero)
    return QuantizedWeight(
        codes.name, codes.shape, parts, "torchao int8", rows, default_dtype(scale)
    )


def _int4(
    stored: Checkpoint, codes: DenseTensor, scale: DenseTensor, zero: DenseTensor
) -> QuantizedWeight:
    columns = 2 * codes.shape[-1] if len(codes.shape) == 2 else 0
    groups = scale.shape[0] if len(scale.shape) == 2 else 0
    if not groups or columns % groups or scale.shape[1] != codes.shape[0]:
        raise _misfit(stored, codes, scale)

    def rows(start: int, stop: int) -> Array:
        found = unpack(codes.rows(start, stop), 4, 0, columns)
        found[found > 7] -= 16
        grouped = found.reshape(stop - start, groups, columns // groups)
        grouped *= scale.array()[:, start:stop].T.astype(numpy.float32)[..., None]
        grouped += zero.array()[:, start:stop].T.astype(numpy.float32)[..., None]
        return found

    shape, parts = (codes.shape[0], columns), (codes, scale, zero)
    return QuantizedWeight(codes.name, shape, parts, "torchao int4", rows, default_dtype(scale))


def _misfit(stored: Checkpoint, codes: DenseTensor, scale: DenseTensor) -> InputError:
    return InputError(
        f"tensor {printable(codes.name)} is {codes.dtype} {list(codes.shape)} with scales "
        f"{scale.dtype} {list(scale.shape)}, wanted I8 (out, in) and (out, groups), or I8 "
        "(out, in / 2) with scales and zeros (groups, out), with groups that divide in",
        path=stored.path,
        hint=DAMAGED,
    )


METHOD = QuantizationMethod(
    TORCHAO, _weights, dropped=_ACTIVATIONS, dropped_what="scales of activations"
)
CONVERTER = quantized_format(METHOD, "torchao checkpoint in safetensors: int8, int4, float8")
