"""Checkpoints of NVIDIA's Model Optimizer (modelopt): NVFP4, float8, int8, and int4 of AWQ.

Format: modelopt 0.47 (2026), ``export_hf_checkpoint``. Beside ``weight`` stand ``weight_scale``
and, in NVFP4, ``weight_scale_2``: W = level · weight_scale · weight_scale_2, with one E4M3 scale
for 16 values of a row, two of them in a byte. Stacks of experts that a class stores as (experts,
in, out) are packed along ``in`` and named ``P``, ``P_weight_scale`` and ``P_weight_scale_2``.
Integers of four bits share a byte with the next output feature. AWQ multiplies activations by
``pre_quant_scale``: here the columns of the weight are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy

from loraformat.errors import InputError, printable
from loraformat.model.block_numbers import SCALE_TYPES, BlockNumbers, default_dtype, scaled
from loraformat.model.checkpoint import Checkpoint, DenseTensor
from loraformat.model.float_codes import (
    ACTIVATIONS,
    ACTIVATIONS_WHAT,
    FLOAT8_VALUES,
    block_size,
    float4_weight,
    float8_weight,
)
from loraformat.model.packed_weights import MODELOPT
from loraformat.model.quantization_method import (
    DAMAGED,
    QuantizationMethod,
    QuantizedWeight,
    stored_part,
)
from loraformat.shards.quantized import quantized_format
from loraformat.tensors.arrays import Array
from loraformat.tensors.packed_codes import e2m1, unpack

__all__ = ["CONVERTER", "METHOD"]

_CODES = ("U8", "I8", *FLOAT8_VALUES)
_GROUP = 16


def _weights(stored: Checkpoint) -> Iterator[QuantizedWeight]:
    for name, codes in stored.tensors.items():
        if not isinstance(codes, DenseTensor) or codes.dtype not in _CODES:
            continue
        own = name.endswith(".weight")
        scale = f"{name}_scale" if own else f"{name}_weight_scale"
        if own or scale in stored.tensors:
            yield _smoothed(stored, _weight(stored, codes, scale))


def _weight(stored: Checkpoint, codes: DenseTensor, name: str) -> QuantizedWeight:
    if codes.dtype in FLOAT8_VALUES:
        scale = stored_part(stored, name, (*SCALE_TYPES, "U8", "F8_E8M0"))
        return float8_weight(codes, scale, block_size(None, stored.path), stored.path)
    if codes.dtype == "I8":
        return _int8(stored, codes, stored_part(stored, name, SCALE_TYPES))
    scale = stored_part(stored, name, (*SCALE_TYPES, "F8_E4M3", "U8"))
    if scale.dtype in SCALE_TYPES:
        return _int4(stored, codes, scale)
    second = stored_part(stored, f"{name}_2", ("F32",)) if scale.dtype == "F8_E4M3" else None
    if second is not None and not codes.name.endswith(".weight"):
        return _stack(stored, codes, scale, second)
    return float4_weight(codes.name, codes, scale, second, numpy.multiply, stored.path)


def _int8(stored: Checkpoint, codes: DenseTensor, scale: DenseTensor) -> QuantizedWeight:
    scales = BlockNumbers.scales(scale, codes.shape, (1, 1), stored.path)
    rows = scaled(lambda start, stop: codes.rows(start, stop).astype(numpy.float32), scales.rows)
    return QuantizedWeight(
        codes.name, codes.shape, (codes, scale), "int8", rows, default_dtype(scale)
    )


def _int4(stored: Checkpoint, codes: DenseTensor, scale: DenseTensor) -> QuantizedWeight:
    """Return a weight whose bytes hold two signed codes, of neighbouring rows."""
    shape = (2 * codes.shape[0], codes.shape[-1]) if len(codes.shape) == 2 else ()
    groups = scale.shape[-1] if len(scale.shape) == 2 else 0
    if not shape or not groups or scale.shape[0] != shape[0] or shape[1] % groups:
        raise _misfit(stored, codes, scale, "U8 (out / 2, in) with scales (out, groups)")

    def integers(start: int, stop: int) -> Array:
        first = start // 2
        columns = codes.rows(first, -(-stop // 2)).T  # a byte is two rows of its column
        codes_of = unpack(columns[..., None], 4, 0, 2).reshape(len(columns), -1).T
        return (codes_of[start - 2 * first : stop - 2 * first] + 8) % 16 - 8

    def factors(start: int, stop: int) -> Array:
        return scale.rows(start, stop).astype(numpy.float32)

    rows = scaled(integers, factors)
    return QuantizedWeight(codes.name, shape, (codes, scale), "int4", rows, default_dtype(scale))


def _stack(
    stored: Checkpoint, codes: DenseTensor, scale: DenseTensor, second: DenseTensor
) -> QuantizedWeight:
    """Return experts (experts, in, out) in NVFP4 that are packed along ``in``."""
    experts, pairs, out = codes.shape if len(codes.shape) == 3 else (0, 0, 0)
    height = 2 * pairs
    if scale.shape != (experts, height / _GROUP, out) or second.count not in (1, experts):
        raise _misfit(
            stored, codes, scale, "U8 (experts, in / 2, out) with scales (experts, in / 16, out)"
        )

    def rows(start: int, stop: int) -> Array:
        result = numpy.empty((stop - start, out), numpy.float32)
        seconds = numpy.broadcast_to(second.array().reshape(-1), experts)
        for expert in range(start // height, -(-stop // height)):
            offset = expert * height
            first, last = max(start - offset, 0), min(stop - offset, height)
            some = slice(first // _GROUP, -(-last // _GROUP))
            bytes_ = codes.array()[expert, some.start * _GROUP // 2 : some.stop * _GROUP // 2]
            values = e2m1(bytes_.T)
            factors = scale.array()[expert, some].astype(numpy.float32) * seconds[expert]
            values *= factors.T.repeat(_GROUP, axis=1)
            result[offset + first - start : offset + last - start] = values.T[
                first - some.start * _GROUP : last - some.start * _GROUP
            ]
        return result

    shape, parts = (experts, height, out), (codes, scale, second)
    return QuantizedWeight(codes.name, shape, parts, "NVFP4", rows)


def _smoothed(stored: Checkpoint, weight: QuantizedWeight) -> QuantizedWeight:
    """Return the weight times ``pre_quant_scale``, which its activations would be, by column."""
    owner, _, last = weight.name.rpartition(".")
    name = f"{owner}.pre_quant_scale"
    if last != "weight" or name not in stored.tensors:
        return weight
    columns = stored_part(stored, name, SCALE_TYPES, weight.shape[-1:])
    rows = scaled(weight.rows, lambda start, stop: columns.array().astype(numpy.float32))
    return replace(weight, parts=(*weight.parts, columns), rows=rows)


def _misfit(stored: Checkpoint, codes: DenseTensor, scale: DenseTensor, wanted: str) -> InputError:
    return InputError(
        f"tensor {printable(codes.name)} is {codes.dtype} {list(codes.shape)} with scales "
        f"{scale.dtype} {list(scale.shape)}, wanted {wanted}",
        path=stored.path,
        hint=DAMAGED,
    )


METHOD = QuantizationMethod(MODELOPT, _weights, dropped=ACTIVATIONS, dropped_what=ACTIVATIONS_WHAT)
CONVERTER = quantized_format(METHOD, "NVIDIA modelopt checkpoint: NVFP4, float8, int8, int4 of AWQ")
