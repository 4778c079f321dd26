"""ctypes bindings of the C interval code."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_int, c_int64, c_void_p
from functools import cache

import numpy
import torch
from torch import Tensor

from loraformat.nf4.kernels import active
from loraformat.nf4.kernels.native import ISAS, library

__all__ = ["Tile", "decode", "encode", "loaded"]

_INTERFACE = 1
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


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


@cache
def _library() -> ctypes.CDLL | None:
    lib = library()
    if lib is None or not hasattr(lib, "interval_interface"):
        return None
    if lib.interval_interface() != _INTERFACE:
        return None
    for call in (lib.interval_encode, lib.interval_decode):
        call.argtypes = [c_int, c_int, c_int, POINTER(Tile)]
    return lib


def loaded() -> bool:
    """Tell whether compiled code shall be used: it is there, and the environment allows it.

    Raises
    ------
    UsageError
        As `loraformat.nf4.kernels.active`.
    """
    return active().name != "torch" and _library() is not None


def _steps(operand: Tensor, rows: int, columns: int) -> tuple[Tensor, int, int]:
    """Return a float32 operand that broadcasts, and its steps between rows and columns."""
    wide = operand.float().expand(rows, columns)
    if columns > 1 and wide.stride(1) not in (0, 1):
        wide = wide.contiguous()
    row, column = wide.stride()
    return wide, 0 if rows == 1 else row, 0 if columns == 1 else column


def _run(
    name: str, merged: Tensor, delta: Tensor, gain: Tensor | None, weight: Tensor, tile: Tile
) -> bool:
    lib = _library()
    assert lib is not None and merged.is_contiguous() and weight.is_contiguous()
    columns = merged.shape[-1] if merged.dim() else 1
    tile.rows, tile.columns = merged.numel() // max(columns, 1), columns
    if gain is None and (delta.numel() == 1 or delta.shape == merged.shape):
        tile.rows, tile.columns = 1, merged.numel()  # one long row
        delta = delta.reshape(-1)
    deltas, tile.delta_row, tile.delta_step = _steps(delta, tile.rows, tile.columns)
    tile.delta = deltas.data_ptr()
    if gain is not None:
        gains, tile.gain_row, tile.gain_step = _steps(gain, tile.rows, tile.columns)
        tile.gain = gains.data_ptr()
    tile.merged, tile.weight = merged.data_ptr(), weight.data_ptr()
    call = getattr(lib, f"interval_{name}")
    isa = ISAS.index(active().name)
    return bool(call(isa, _DTYPES[weight.dtype], _DTYPES[merged.dtype], ctypes.byref(tile)))


def encode(
    weight: Tensor, delta: Tensor, gain: Tensor | None, merged: Tensor
) -> tuple[bytes, Tensor] | None:
    """Do what `loraformat.undo.interval_code.encode_tile` does; None if it cannot be done.

    Parameters
    ----------
    weight, merged : Tensor
        Contiguous, of one shape: float32, float16 or bfloat16.
    delta, gain : Tensor
        Broadcast to that shape.
    """
    bits = numpy.empty(4 * weight.numel() + 8, numpy.uint8)
    zeros = torch.empty(weight.numel(), dtype=torch.int64)
    tile = Tile(bits=bits.ctypes.data, size=bits.size, zeros=zeros.data_ptr())
    if not _run("encode", merged, delta, gain, weight, tile):
        return None
    return bits[: tile.size].tobytes(), zeros[: tile.zero_count].clone()


def decode(
    merged: Tensor, delta: Tensor, gain: Tensor | None, bits: bytes | memoryview, weight: Tensor
) -> bool:
    """Fill `weight`, which is contiguous; False if the bits are not the tile's."""
    data = numpy.frombuffer(bits, numpy.uint8) if len(bits) else numpy.empty(1, numpy.uint8)
    tile = Tile(bits=data.ctypes.data, size=len(bits))
    return _run("decode", merged, delta, gain, weight, tile)
