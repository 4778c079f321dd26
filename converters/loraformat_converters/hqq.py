"""HQQ checkpoints, as transformers saves them in safetensors.

Format: github.com/mobiusml/hqq, 0.2.8 (2025), ``HQQLinear.state_dict``. A weight (out, in) is cut
into groups: a matrix (groups, size) of neighbours (``axis`` 1), or (size, groups) (``axis`` 0).
``W_q`` packs rows of that matrix which lie far from each other into one: the first part of them in
the highest bits. W = (code − zero) · scale, with one scale and zero for each group. Settings are
tensors: numbers, and words as bytes.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy

from loraformat.errors import InputError, UnsupportedError, printable
from loraformat.model.block_numbers import SCALE_TYPES
from loraformat.model.checkpoint import Checkpoint, DenseTensor
from loraformat.model.packed_weights import HQQ, ORIGINAL
from loraformat.model.quantization_method import (
    DAMAGED,
    QuantizationMethod,
    QuantizedWeight,
    stored_part,
)
from loraformat.shards.quantized import quantized_format
from loraformat.tensors.arrays import Array, array_view
from loraformat.tensors.dtypes import ITEM_BYTES

__all__ = ["CONVERTER", "METHOD"]

_CODES = ".W_q"
#: Bits of a code, codes in a word, and its type, by the name of the packing.
_PACKINGS = {
    "8bit_u8": (8, 1, "U8"), "4bit_u8": (4, 2, "U8"), "3bit_32": (3, 10, "I32"),
    "2bit_u8": (2, 4, "U8"), "1bit_u8": (1, 8, "U8"),
}  # fmt: skip
_LONGEST_WORD = 64
_SETTINGS = (
    "nbits", "group_size", "shape", "axis", "packing", "unpack_view_dtype", "view_as_float",
    "quant_scale", "quant_zero", "compute_dtype", "offload_meta", "encoded_state_dict",
    "stores_quant_config", "channel_wise", "optimize", "round_zero",
)  # fmt: skip
_DTYPES = {"torch.float16": "F16", "torch.bfloat16": "BF16", "torch.float32": "F32"}


def _weights(stored: Checkpoint) -> Iterator[QuantizedWeight]:
    for name, codes in stored.tensors.items():
        if name.endswith(_CODES) and isinstance(codes, DenseTensor):
            yield _weight(stored, name.removesuffix(_CODES), codes)


def _weight(stored: Checkpoint, owner: str, codes: DenseTensor) -> QuantizedWeight:
    shape = stored_part(stored, f"{owner}.shape", ("I64", "I32"), (2,)).array()
    height, width = (int(size) for size in shape)
    packing = _word(stored, f"{owner}.packing")
    axis, size = (_number(stored, f"{owner}.{name}") for name in ("axis", "group_size"))
    if packing not in _PACKINGS or any(
        _number(stored, f"{owner}.{name}")
        for name in ("quant_scale", "quant_zero")
        if f"{owner}.{name}" in stored.tensors
    ):
        raise UnsupportedError(
            f"module {printable(owner)} has packing {printable(packing)}, or scales that are "
            f"quantized; only {', '.join(_PACKINGS)} can be read",
            path=stored.path,
            hint=ORIGINAL,
        )
    bits, each, word = _PACKINGS[packing]
    count = height * width
    fits = min(height, width, size) > 0 and axis in (0, 1) and count % size == 0
    groups = count // size if fits else 0
    length, columns = (groups, size) if axis == 1 else (size, groups)
    step = -(-length // each)
    # With view_as_float the words are labelled as numbers of the model's type.
    if not fits or codes.nbytes != step * columns * ITEM_BYTES[word]:
        raise InputError(
            f"tensor {printable(codes.name)} is {codes.dtype} {list(codes.shape)}, wanted codes of "
            f"{bits} bits for a weight of shape {[height, width]} in groups of {size} along axis "
            f"{axis}",
            path=stored.path,
            hint=DAMAGED,
        )
    one_each = (groups, 1) if axis == 1 else (1, groups)
    scale = stored_part(stored, f"{owner}.scale", SCALE_TYPES, one_each)
    zero = stored_part(stored, f"{owner}.zero", SCALE_TYPES, one_each)

    def rows(start: int, stop: int) -> Array:
        first, last = start * width // columns, -(-stop * width // columns)
        words = array_view(codes.load(), word, (step, columns))
        found = _codes(words, bits, each, first, last)
        some = slice(first, last) if axis == 1 else slice(None)
        found -= zero.array()[some].astype(numpy.float32)
        found *= scale.array()[some].astype(numpy.float32)
        begin = start * width - first * columns
        return found.reshape(-1)[begin : begin + (stop - start) * width].reshape(-1, width)

    settings = [stored.tensors.get(f"{owner}.{name}") for name in _SETTINGS]
    parts = (codes, scale, zero, *(part for part in settings if isinstance(part, DenseTensor)))
    named = (
        _word(stored, f"{owner}.compute_dtype")
        if f"{owner}.compute_dtype" in stored.tensors
        else ""
    )
    dtype = _DTYPES.get(named, "F16" if scale.dtype == "F16" else "BF16")
    return QuantizedWeight(f"{owner}.weight", (height, width), parts, f"HQQ int{bits}", rows, dtype)


def _codes(words: Array, bits: int, each: int, start: int, stop: int) -> Array:
    """Return some rows of the matrix of groups, float32."""
    step = len(words)
    found = numpy.empty((stop - start, words.shape[1]), numpy.float32)
    for part in range(start // step, -(-stop // step)):
        first, last = max(start, part * step), min(stop, (part + 1) * step)
        some = words[first - part * step : last - part * step]
        found[first - start : last - start] = some >> bits * (each - 1 - part) & (1 << bits) - 1
    return found


def _number(stored: Checkpoint, name: str) -> int:
    return int(stored_part(stored, name, ("I32", "I64", "U8"), ()).array())


def _word(stored: Checkpoint, name: str) -> str:
    found = stored_part(stored, name, ("U8",))
    return bytes(found.load()[:_LONGEST_WORD]).decode("latin-1")


METHOD = QuantizationMethod(HQQ, _weights)
CONVERTER = quantized_format(
    METHOD, "HQQ checkpoint: 1, 2, 3, 4 or 8 bits by group, along any axis"
)
