"""Merging one tile of a weight and measuring the rounding, in C or torch.

    out = round(g · (w + d))

Both give the same bits, but for the payload of a NaN. The measures are sums over elements, of
the exact change D = g · (w + d) − w and the effective one E = out − w; they agree to about six
digits.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_double, c_int, c_int64, c_void_p
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from loraformat.nf4.kernels import active
from loraformat.nf4.kernels.native import ISAS, library

__all__ = ["TileSums", "merge_tile", "merge_tile_in_torch"]

_INTERFACE = 1
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_FLOAT16_MAX = 65504.0


class TileSums(NamedTuple):
    """What a tile was measured to be.

    Attributes
    ----------
    weight, delta, product, error : float
        Σ w², Σ D², Σ E·D, Σ (E − D)².
    changed, swallowed, clipped : int
        Elements with D ≠ 0, those of them that come out as without an adapter, and elements
        that were beyond the range of float16.
    """

    weight: float
    delta: float
    product: float
    error: float
    changed: int
    swallowed: int
    clipped: int


class _Job(ctypes.Structure):
    """``merge_job`` of merge.h."""

    _fields_ = (
        ("rows", c_int64),
        ("columns", c_int64),
        ("weight", c_void_p),
        ("delta", c_void_p),
        ("gain", c_void_p),
        ("gain_row", c_int64),
        ("gain_step", c_int64),
        ("out", c_void_p),
        ("measure", c_int64),
        ("sums", c_double * 4),
        ("changed", c_int64),
        ("swallowed", c_int64),
        ("clipped", c_int64),
    )


@cache
def _library() -> ctypes.CDLL | None:
    lib = library()
    if lib is None or not hasattr(lib, "merge_interface"):
        return None
    if lib.merge_interface() != _INTERFACE:
        return None
    lib.merge_tile.argtypes = [c_int, c_int, c_int, POINTER(_Job)]
    lib.merge_tile.restype = None
    return lib


def merge_tile(
    weight: Tensor, delta: Tensor | None, gain: Tensor | None, out: Tensor, *, measure: bool = False
) -> TileSums | None:
    """Merge a tile into ``out``.

    Parameters
    ----------
    weight : Tensor
        float32, float16 or bfloat16 (rows, columns), contiguous.
    delta : Tensor or None
        float32 (rows, columns), contiguous; None is zero.
    gain : Tensor or None
        float32 (rows, 1) or (1, columns), contiguous: DoRA's. None is 1.
    out : Tensor
        Like ``weight``, of any of the three types. float16 saturates at ±65504; NaN stays NaN.
        Every step is in float32, rounded to nearest even.
    measure : bool

    Returns
    -------
    TileSums or None
        None unless it was asked for.

    Examples
    --------
    >>> out = torch.empty(1, 2, dtype=torch.bfloat16)
    >>> merge_tile(torch.ones(1, 2), torch.tensor([[0.0, 0.001]]), None, out, measure=True)
    TileSums(weight=2.0, delta=1.0000...e-06, ..., changed=1, swallowed=1, clipped=0)
    """
    kernel, lib = active().name, _library()
    if kernel == "torch" or lib is None:
        return merge_tile_in_torch(weight, delta, gain, out, measure=measure)
    rows, columns = weight.shape
    job = _Job(
        rows,
        columns,
        weight.data_ptr(),
        None if delta is None else delta.data_ptr(),
        None if gain is None else gain.data_ptr(),
        1 if gain is not None and len(gain) == rows and gain.shape[1] == 1 else 0,
        1 if gain is not None and gain.shape[1] == columns and columns > 1 else 0,
        out.data_ptr(),
        measure,
    )
    lib.merge_tile(ISAS.index(kernel), _DTYPES[weight.dtype], _DTYPES[out.dtype], job)
    if not measure:
        return None
    weights, deltas, products, errors = job.sums
    return TileSums(weights, deltas, products, errors, job.changed, job.swallowed, job.clipped)


def merge_tile_in_torch(
    weight: Tensor, delta: Tensor | None, gain: Tensor | None, out: Tensor, *, measure: bool = False
) -> TileSums | None:
    """Do what `merge_tile` does without compiled code."""
    before = weight.float()
    change = torch.zeros(()) if delta is None else delta
    total = before + change
    if gain is not None:
        total = total * gain
    clipped = int((total.abs() > _FLOAT16_MAX).sum()) if out.dtype == torch.float16 else 0
    _round(total, out)
    if not measure:
        return None
    exact = (change.expand_as(before) if gain is None else total - before).reshape(-1)
    effect = (out.float() - before).reshape(-1)
    rest = effect - exact
    plain = torch.empty_like(out)
    _round(before, plain)
    changed = exact != 0
    flat = before.reshape(-1)
    return TileSums(
        weight=float(flat @ flat),
        delta=float(exact @ exact),
        product=float(effect @ exact),
        error=float(rest @ rest),
        changed=int(changed.sum()),
        swallowed=int((changed & (out == plain).reshape(-1)).sum()),
        clipped=clipped,
    )


def _round(values: Tensor, out: Tensor) -> None:
    if out.dtype == torch.float16:
        values = values.clamp(-_FLOAT16_MAX, _FLOAT16_MAX)
    out.copy_(values)
