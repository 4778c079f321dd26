"""ctypes bindings of the C interval code."""

from __future__ import annotations

import ctypes
from ctypes import c_int64, c_void_p

import numpy

from loraformat.nf4.kernels import active
from loraformat.nf4.kernels.native import DTYPES, ISAS, library
from loraformat.tensors.arrays import Array

__all__ = ["Tile", "decode", "encode", "loaded"]


class Tile(ctypes.Structure):
    """``interval_tile`` of interval.h."""

    _fields_ = (
        ("rows", c_int64),
        ("columns", c_int64),
        ("merged", c_void_p),
        ("delta", c_void_p),
        ("delta_row", c_int64),
        ("delta_step", c_int64),
        ("gain", c_void_p),
        ("gain_row", c_int64),
        ("gain_step", c_int64),
        ("weight", c_void_p),
        ("bits", c_void_p),
        ("size", c_int64),
        ("zeros", c_void_p),
        ("zero_count", c_int64),
    )


def loaded() -> bool:
    """Tell whether compiled code is selected; raises as `loraformat.nf4.kernels.active`."""
    return active().name in ISAS


def _steps(operand: Array, rows: int, columns: int) -> tuple[Array, int, int]:
    """Return a float32 operand that broadcasts, and its steps between rows and columns."""
    wide = numpy.broadcast_to(operand.astype(numpy.float32, copy=False), (rows, columns))
    if columns > 1 and wide.strides[1] not in (0, wide.itemsize):
        wide = numpy.ascontiguousarray(wide)
    row, column = (stride // wide.itemsize for stride in wide.strides)
    return wide, 0 if rows == 1 else row, 0 if columns == 1 else column


def _run(
    name: str, merged: Array, delta: Array, gain: Array | None, weight: Array, tile: Tile
) -> bool:
    assert merged.flags.c_contiguous and weight.flags.c_contiguous
    columns = merged.shape[-1] if merged.ndim else 1
    tile.rows, tile.columns = merged.size // max(columns, 1), columns
    if gain is None and (delta.size == 1 or delta.shape == merged.shape):
        tile.rows, tile.columns = 1, merged.size  # one long row
        delta = delta.reshape(-1)
    deltas, tile.delta_row, tile.delta_step = _steps(delta, tile.rows, tile.columns)
    tile.delta = deltas.ctypes.data
    if gain is not None:
        gains, tile.gain_row, tile.gain_step = _steps(gain, tile.rows, tile.columns)
        tile.gain = gains.ctypes.data
    tile.merged, tile.weight = merged.ctypes.data, weight.ctypes.data
    types = DTYPES[weight.dtype], DTYPES[merged.dtype]
    call = getattr(library(), f"interval_{name}")
    return bool(call(ISAS.index(active().name), *types, ctypes.byref(tile)))


def encode(
    weight: Array, delta: Array, gain: Array | None, merged: Array
) -> tuple[bytes, Array] | None:
    """Do what `loraformat.undo.interval_code.encode_tile` does; None if it cannot be done.

    Weight and merged weight are contiguous, float32, float16 or bfloat16, and of one shape, to
    which delta and gain are broadcast.
    """
    bits = numpy.empty(4 * weight.size + 8, numpy.uint8)
    zeros = numpy.empty(weight.size, numpy.int64)
    tile = Tile(bits=bits.ctypes.data, size=bits.size, zeros=zeros.ctypes.data)
    if not _run("encode", merged, delta, gain, weight, tile):
        return None
    return bits[: tile.size].tobytes(), zeros[: tile.zero_count].copy()


def decode(
    merged: Array, delta: Array, gain: Array | None, bits: bytes | memoryview, weight: Array
) -> bool:
    """Fill `weight`, which is contiguous; False if the bits are not the tile's."""
    data = numpy.frombuffer(bits, numpy.uint8) if len(bits) else numpy.empty(1, numpy.uint8)
    tile = Tile(bits=data.ctypes.data, size=len(bits))
    return _run("decode", merged, delta, gain, weight, tile)
