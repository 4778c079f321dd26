"""bitsandbytes 4-bit checkpoints whose codes are FP4, with or without double quantization.

Format: as NF4 (``loraformat.nf4``), with another table of 16 levels and another name of the quant
state. FP4 has one sign bit, two exponent bits and one of mantissa; it is not E2M1.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy

from loraformat.errors import InputError, printable
from loraformat.model import config_json
from loraformat.model.architecture import is_conv1d
from loraformat.model.checkpoint import Checkpoint, DenseTensor
from loraformat.model.packed_weights import BITSANDBYTES_FP4
from loraformat.model.quantization_method import (
    DAMAGED,
    QuantizationMethod,
    QuantizedWeight,
    stored_part,
)
from loraformat.nf4.quant_state import (
    MAX_QUANT_STATE_BYTES,
    NESTED_BLOCK_SIZE,
    QuantState,
    parse_quant_state,
)
from loraformat.nf4.quantized import NF4, ceil_div
from loraformat.nf4.tables import NESTED_MAP_BYTES
from loraformat.shards.quantized import quantized_format
from loraformat.shards.stored_tensors import FP4_STATE_SUFFIX
from loraformat.tensors.arrays import Array, array_view
from loraformat.tensors.dtypes import ITEM_BYTES

__all__ = ["CONVERTER", "METHOD"]

#: By code; the eight negative ones follow.
_MAGNITUDES = numpy.array([0, 0.0625, 8, 12, 4, 6, 2, 3], numpy.float32) / 12
_LEVELS = numpy.concatenate([_MAGNITUDES, -_MAGNITUDES])
_BYTES = numpy.arange(256)
#: The numbers of each byte: the first code is in the high nibble.
_PAIRS = _LEVELS[numpy.stack([_BYTES >> 4, _BYTES & 15], axis=1)]


def _weights(stored: Checkpoint) -> Iterator[QuantizedWeight]:
    config = config_json.parse(stored.config) if stored.config else {}
    for name in stored.tensors:
        if name.endswith(FP4_STATE_SUFFIX):
            owner = name.removesuffix(FP4_STATE_SUFFIX)
            yield _weight(stored, owner, is_conv1d(owner, config.get("model_type")))


def _weight(stored: Checkpoint, name: str, transposed: bool) -> QuantizedWeight:
    text = stored_part(stored, name + FP4_STATE_SUFFIX, ("U8",))
    state = parse_quant_state(
        bytes(text.load()[: MAX_QUANT_STATE_BYTES + 1]), name, stored.path, quant_type="fp4"
    )
    blocks = ceil_div(state.count, state.block_size)
    packed = stored_part(stored, name, ITEM_BYTES)  # of any type, by bnb_4bit_quant_storage
    if packed.nbytes != ceil_div(state.count, 2) or len(state.shape) != 2:
        raise InputError(
            f"tensor {printable(name)} has {packed.nbytes} bytes of codes, which are no matrix of "
            f"shape {list(state.shape)}",
            path=stored.path,
            hint=DAMAGED,
        )
    absmax = stored_part(
        stored, f"{name}.absmax", ("U8" if state.double_quant else "F32",), (blocks,)
    )
    parts = [packed, absmax, text, stored_part(stored, f"{name}.quant_map", ("F32",), (16,))]
    nested = None
    if state.double_quant:
        count = ceil_div(blocks, NESTED_BLOCK_SIZE)
        nested = stored_part(stored, f"{name}.nested_absmax", ("F32",), (count,))
        parts += [nested, stored_part(stored, f"{name}.nested_quant_map", ("F32",), (256,))]
    if not numpy.array_equal(parts[3].array(), _LEVELS) or (
        nested is not None and bytes(parts[5].load()) != NESTED_MAP_BYTES
    ):
        raise InputError(
            f"tensor {printable(parts[3].name)}, or that of the scales, is not the table of FP4",
            path=stored.path,
            hint=DAMAGED,
        )

    def rows(start: int, stop: int) -> Array:
        return _decoded(state, packed, absmax, nested, start, stop)

    def columns(start: int, stop: int) -> Array:
        return rows(0, state.shape[0])[:, start:stop].T

    return QuantizedWeight(
        name,
        state.shape[::-1] if transposed else state.shape,
        tuple(parts),
        "bitsandbytes fp4",
        columns if transposed else rows,
        state.dtype,
    )


def _decoded(
    state: QuantState,
    packed: DenseTensor,
    absmax: DenseTensor,
    nested: DenseTensor | None,
    start: int,
    stop: int,
) -> Array:
    """Return some rows, float32; blocks run on from a row into the next."""
    width, size = state.shape[1], state.block_size
    first, last = start * width // size, ceil_div(stop * width, size)
    codes = array_view(packed.load(), "U8", (packed.nbytes,))
    # Its scales are those of NF4; its codes are not asked for.
    scales = NF4(
        codes,
        absmax.array(),
        state.count,
        size,
        None if nested is None else nested.array(),
        state.nested_offset,
    ).scales(first, last)
    values = _PAIRS[codes[first * size // 2 : last * size // 2]].reshape(-1)
    values *= scales.repeat(size)[: len(values)]
    begin = first * size
    return values[start * width - begin : stop * width - begin].reshape(stop - start, width)


METHOD = QuantizationMethod(BITSANDBYTES_FP4, _weights)
CONVERTER = quantized_format(
    METHOD, "bitsandbytes FP4 checkpoint, with or without double quantization"
)
