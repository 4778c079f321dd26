"""Encoding of values to ggml block types.

Q8_0 has ggml's own bits. The scales of Q4_0, Q4_1, Q5_0 and Q5_1 are searched for, see
`scale_search`: their errors are smaller than ggml's plain encoder's.
"""

from __future__ import annotations

import numpy

from loraformat.tensors.arrays import Array
from loraformat_converters.gguf.container.types import GGMLType
from loraformat_converters.gguf.quantization.scale_search import divided, offset_codes, signed_codes

__all__ = ["store_blocks"]

#: What `signed_codes` tries, and `offset_codes`: chosen by the errors from normal numbers and
#: from NF4 that were measured with more and fewer of them.
_STRETCHES = {
    GGMLType.Q4_0: (1.0, 0.9, 0.94, 1.04, 1.08, 1.12),
    GGMLType.Q5_0: (1.0, 0.925, 0.9625, 1.0375, 1.075),
}
_SHARES = {GGMLType.Q4_1: (1.0, 0.93, 0.86), GGMLType.Q5_1: (1.0, 0.97, 0.94)}
#: Blocks that are encoded at a time, as columns: numpy then goes over long rows. Few enough for a
#: cache, and no power of two, or all rows would meet in the same places of it.
_BLOCKS = 3008


def store_blocks(tile: Array, stored: Array, type: GGMLType) -> None:
    """Write the bytes of some rows.

    Parameters
    ----------
    tile : numpy.ndarray
        float32, rows of whole blocks; finite, and within float16.
    stored : numpy.ndarray
        uint8, to be filled row by row.
    type : GGMLType
        Q8_0, Q5_1, Q5_0, Q4_1 or Q4_0.
    """
    rows, out = tile.reshape(-1, type.block), stored.reshape(-1, type.block_bytes)
    for start in range(0, len(rows), _BLOCKS):
        _store_some(rows[start : start + _BLOCKS], out[start : start + _BLOCKS], type)


def _store_some(rows: Array, out: Array, type: GGMLType) -> None:
    blocks = numpy.ascontiguousarray(rows.T)
    levels = 32 if type in (GGMLType.Q5_0, GGMLType.Q5_1) else 16
    if type is GGMLType.Q8_0:
        *scales, codes = _q8_0(blocks)
    elif type in _STRETCHES:
        *scales, codes = signed_codes(blocks, levels, _STRETCHES[type])
    else:
        *scales, codes = offset_codes(blocks, levels, _SHARES[type])
    for place, scale in enumerate(scales):
        out.view(numpy.float16)[:, place] = scale
    at = 2 * len(scales)
    for part in [codes] if type is GGMLType.Q8_0 else _packed(codes, levels):
        out[:, at : at + len(part)] = part.T
        at += len(part)


def _packed(codes: Array, levels: int) -> list[Array]:
    """Return the bytes behind the scales: fifth bits, if there are any, then halves of bytes."""
    half = len(codes) // 2
    packed = [(codes[:half] & 15) | (codes[half:] << 4)]
    if levels == 32:
        fifth = (codes >> 4).reshape(4, 8, -1)
        for bit in range(1, 8):
            fifth[:, 0] |= fifth[:, bit] << bit
        packed.insert(0, fifth[:, 0])
    return packed


def _q8_0(blocks: Array) -> tuple[Array, Array]:
    """Return scales in float16 and int8 codes as bytes, as ggml does: d = max |x| / 127, x / d.

    The quotient is x times the float32 1/d; halves round away from zero
    (``quantize_row_q8_0_ref``).
    """
    numbers = numpy.abs(blocks)
    with numpy.errstate(all="ignore"):  # of blocks that are all but zero
        scale = numbers.max(0) / numpy.float32(127)
        numpy.multiply(blocks, divided(1.0, scale), out=numbers)
        stored = scale.astype(numpy.float16)
    whole = numpy.trunc(numbers)  # what is left decides
    numbers -= whole
    numbers *= 2
    whole += numpy.trunc(numbers, out=numbers)
    return stored, whole.astype(numpy.int8).view(numpy.uint8)
