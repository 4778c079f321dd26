"""Checkpoints of compressed-tensors, which llm-compressor writes and vLLM runs.

Format: github.com/vllm-project/compressed-tensors, 0.20.1 (2026). One checkpoint may hold several
of its forms, and a weight's tensors say which it has:

- ``weight_packed`` I32: integers of 1 to 8 bits along the input, plus half of their range, in
  dense words; ``weight_shape``; ``weight_scale`` by group or output feature; asymmetric ones have
  ``weight_zero_point``, packed in the same way along the output. ``weight_g_idx`` says the group
  of each input feature where it was reordered by activations.
- ``weight_packed`` U8: NVFP4, divided by ``weight_global_scale``, or MXFP4.
- ``weight`` I8 or float8: with ``weight_scale`` by tensor, output feature, group or block.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy

from loraformat.errors import InputError, UnsupportedError, printable
from loraformat.model.block_numbers import (
    SCALE_TYPES,
    BlockNumbers,
    by_column,
    default_dtype,
    scaled,
)
from loraformat.model.checkpoint import Checkpoint, DenseTensor
from loraformat.model.float_codes import (
    ACTIVATIONS,
    ACTIVATIONS_WHAT,
    FLOAT8_VALUES,
    block_size,
    float4_weight,
    float8_weight,
)
from loraformat.model.packed_weights import COMPRESSED_TENSORS, ORIGINAL
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

_WEIGHT, _PACKED, _SCALE = ".weight", ".weight_packed", ".weight_scale"
_ZERO, _SHAPE, _ORDER = ".weight_zero_point", ".weight_shape", ".weight_g_idx"
_SECOND = ".weight_global_scale"


def _weights(stored: Checkpoint) -> Iterator[QuantizedWeight]:
    _refuse_transforms(stored)
    for name, codes in stored.tensors.items():
        if not isinstance(codes, DenseTensor) or ACTIVATIONS.search(name):
            continue
        if name.endswith(_PACKED) and codes.dtype == "U8":
            yield _float4(stored, name.removesuffix(_PACKED), codes)
        elif name.endswith(_PACKED):
            yield _packed(stored, name.removesuffix(_PACKED), codes)
        elif name.endswith(_WEIGHT) and codes.dtype == "I8":
            yield _int8(stored, name.removesuffix(_WEIGHT), codes)
        elif name.endswith(_WEIGHT) and codes.dtype in FLOAT8_VALUES:
            yield _float8(stored, name.removesuffix(_WEIGHT), codes)
        elif name.endswith(_WEIGHT):
            _refuse_unquantized(stored, name.removesuffix(_WEIGHT), codes)


def _refuse_unquantized(stored: Checkpoint, owner: str, weight: DenseTensor) -> None:
    """Refuse dense weights with scales, which the program that runs the model quantizes."""
    if owner + _SCALE in stored.tensors and owner + _PACKED not in stored.tensors:
        raise UnsupportedError(
            f"tensor {printable(weight.name)} has a scale, but is {weight.dtype}, not quantized",
            path=stored.path,
            hint=ORIGINAL,
        )


def _refuse_transforms(stored: Checkpoint) -> None:
    """Refuse what no tensor shows: weights that only a transform of activations undoes."""
    settings = stored.quantization_config or {}
    transforms = settings.get("transform_config")
    sparsity = settings.get("sparsity_config")
    said = "transform_config" if isinstance(transforms, dict) and any(transforms.values()) else ""
    if isinstance(sparsity, dict) and sparsity.get("format") not in (None, "dense"):
        said = f"sparsity_config of format {printable(sparsity.get('format'))}"
    if said:
        raise UnsupportedError(
            f"has a {said}, which is not supported", path=stored.path, hint=ORIGINAL
        )


def _declared(stored: Checkpoint, key: str) -> list[Any]:
    """Return what the config says of weights, for any group of modules."""
    groups, found = (stored.quantization_config or {}).get("config_groups"), []
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict) and key in weights:
            found.append(weights[key])
    return found


def _block(stored: Checkpoint, shape: tuple[int, ...], scale: DenseTensor) -> tuple[int, int]:
    """Return rows and columns of a block: of one row if the scales are by groups."""
    grouped = len(scale.shape) == len(shape) > 0 and scale.shape[:-1] == shape[:-1]
    if grouped and scale.shape[-1]:
        return 1, max(shape[-1] // scale.shape[-1], 1)
    for declared in filter(None, _declared(stored, "block_structure")):
        if isinstance(declared, str):  # until 2025: 128x128
            declared = [int(size) for size in re.findall(r"\d{1,6}", declared)]
        return block_size({"weight_block_size": declared}, stored.path)
    return block_size(None, stored.path)


def _float4(stored: Checkpoint, owner: str, codes: DenseTensor) -> QuantizedWeight:
    scale = stored_part(stored, owner + _SCALE, ("F8_E4M3", "U8", "F8_E8M0"))
    second = stored_part(stored, owner + _SECOND, ("F32",)) if scale.dtype == "F8_E4M3" else None
    return float4_weight(owner + _WEIGHT, codes, scale, second, numpy.divide, stored.path)


def _int8(stored: Checkpoint, owner: str, codes: DenseTensor) -> QuantizedWeight:
    scale = stored_part(stored, owner + _SCALE, SCALE_TYPES)
    block = _block(stored, codes.shape, scale)
    parts, zeros = [codes, scale], None
    if owner + _ZERO in stored.tensors:
        zero = stored_part(stored, owner + _ZERO, ("I8",), scale.shape)
        parts.append(zero)
        zeros = BlockNumbers.of(zero, codes.shape, [block])
    rows = scaled(
        lambda start, stop: codes.rows(start, stop).astype(numpy.float32),
        BlockNumbers.scales(scale, codes.shape, block, stored.path).rows,
        None if zeros is None else zeros.rows,
    )
    return QuantizedWeight(
        codes.name, codes.shape, tuple(parts), "int8", rows, default_dtype(scale)
    )


def _float8(stored: Checkpoint, owner: str, codes: DenseTensor) -> QuantizedWeight:
    scale = stored_part(stored, owner + _SCALE, (*SCALE_TYPES, "U8", "F8_E8M0"))
    block = _block(stored, codes.shape, scale)
    return float8_weight(codes, scale, block, stored.path)


def _packed(stored: Checkpoint, owner: str, codes: DenseTensor) -> QuantizedWeight:
    scale = stored_part(stored, owner + _SCALE, SCALE_TYPES)
    sizes = stored_part(stored, owner + _SHAPE, ("I64", "I32"), (2,))
    rows, columns = shape = tuple(int(size) for size in sizes.array())
    groups = scale.shape[1] if len(scale.shape) == 2 else 1
    bits = _bits(stored, codes, rows, columns)
    if bits is None or not _fits(stored, scale, rows, columns, groups):
        wanted = _words(_declared(stored, "num_bits") or [4, 8])
        size = _words(_declared(stored, "group_size")) or "some"
        raise InputError(
            f"tensor {printable(codes.name)} is {codes.dtype} {list(codes.shape)}, with scales "
            f"{list(scale.shape)}, for a weight of shape {list(shape)}; wanted I32 words of "
            f"integers of {wanted} bits, with a scale for each row or for {size} columns of it",
            path=stored.path,
            hint=DAMAGED,
        )
    parts = [codes, scale, sizes]
    order = zero = None
    if (name := owner + _ORDER) in stored.tensors:
        parts.append(order := stored_part(stored, name, ("I32", "I64"), (columns,)))
    symmetric = _declared(stored, "symmetric")
    if (name := owner + _ZERO) in stored.tensors or (symmetric and not any(symmetric)):
        words = -(-rows * bits // 32)
        parts.append(zero := stored_part(stored, name, ("I32",), (words, groups)))

    def ordered(numbers: Array) -> Array:
        if order is None or order.array().min(initial=0) < 0:  # never assigned
            return numbers
        return by_column(numbers, columns, order.array(), order.name, stored.path)

    def integers(start: int, stop: int) -> Array:
        return unpack(codes.rows(start, stop), bits, 0, columns)

    def factors(start: int, stop: int) -> Array:
        numbers = scale.array().reshape(-1, groups)  # of the tensor: one row of one
        some = numbers if len(numbers) < rows else numbers[start:stop]
        return ordered(some.astype(numpy.float32))

    def zeros(start: int, stop: int) -> Array:
        if zero is None:
            return numpy.full((1, 1), 1 << bits - 1, numpy.float32)
        first = start // 32 * 32  # where a word begins
        some = zero.array()[first * bits // 32 : -(-stop * bits // 32)].T
        return ordered(unpack(some, bits, start - first, stop - first).T)

    decoded, stored_as = scaled(integers, factors, zeros), f"int{bits}"
    return QuantizedWeight(
        owner + _WEIGHT, shape, tuple(parts), stored_as, decoded, default_dtype(scale)
    )


def _bits(stored: Checkpoint, codes: DenseTensor, rows: int, columns: int) -> int | None:
    """Return the bits of a code, of those in the config, 4 and 8 without, that fill the words."""
    if codes.dtype != "I32" or len(codes.shape) != 2 or codes.shape[0] != rows:
        return None
    fitting = {
        bits
        for bits in _declared(stored, "num_bits") or (4, 8)
        if type(bits) is int and 1 <= bits <= 8 and -(-columns * bits // 32) == codes.shape[1]
    }
    return fitting.pop() if len(fitting) == 1 else None


def _fits(stored: Checkpoint, scale: DenseTensor, rows: int, columns: int, groups: int) -> bool:
    """Tell whether scales are by tensor, by row, or by groups of a size that the config says."""
    if scale.shape not in ((), (1,), (rows,), (rows, groups)) or groups == 0 or columns % groups:
        return False
    declared = [size for size in _declared(stored, "group_size") if type(size) is int and size > 0]
    return groups == 1 or not declared or columns // groups in declared


def _words(values: list[Any]) -> str:
    return " or ".join(sorted({printable(value) for value in values}))


METHOD = QuantizationMethod(
    COMPRESSED_TENSORS, _weights, dropped=ACTIVATIONS, dropped_what=ACTIVATIONS_WHAT
)
CONVERTER = quantized_format(
    METHOD, "compressed-tensors checkpoint: packed integers, int8, float8, NVFP4, MXFP4"
)
