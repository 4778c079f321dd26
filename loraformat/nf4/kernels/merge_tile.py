"""Merging one tile of a weight and measuring the rounding, in C or numpy.

    out = round(g · (w + d))

Both give the same bits, but for the payload of a NaN. The measures are sums over elements, of
the exact change D = g · (w + d) − w and the effective one E = out − w; they agree to about six
digits.
"""

from __future__ import annotations

import ctypes
from ctypes import c_double, c_int64, c_void_p
from typing import Any, NamedTuple

import numpy

from loraformat.nf4.kernels import active
from loraformat.nf4.kernels.native import DTYPES, ISAS, address, library
from loraformat.tensors.arrays import Array

__all__ = ["TileSums", "merge_tile", "merge_tile_in_numpy", "merged_values"]

_FLOAT16_MAX = 65504.0


class TileSums(NamedTuple):
    """Measured sums of a tile.

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


def merge_tile(
    weight: Array, delta: Array | None, gain: Array | None, out: Array, *, measure: bool = False
) -> TileSums | None:
    """Merge a tile into ``out``.

    Parameters
    ----------
    weight : array
        float32, float16 or bfloat16 (rows, columns), contiguous.
    delta : array or None
        float32 (rows, columns), contiguous; None is zero.
    gain : array or None
        float32 (rows, 1) or (1, columns), contiguous: DoRA's. None is 1.
    out : array
        Like ``weight``, of any of the three types. float16 saturates at ±65504; NaN stays NaN.
        Every step is in float32, rounded to nearest even.
    measure : bool

    Returns
    -------
    TileSums or None
        None unless it was asked for.

    Examples
    --------
    >>> from loraformat.tensors.arrays import numpy_dtype
    >>> out = numpy.empty((1, 2), numpy_dtype("BF16"))
    >>> delta = numpy.array([[0.0, 0.001]], numpy.float32)
    >>> merge_tile(numpy.ones_like(delta), delta, None, out, measure=True)
    TileSums(weight=2.0, delta=1.0000...e-06, ..., changed=1, swallowed=1, clipped=0)
    """
    kernel, lib = active().name, library()
    if kernel not in ISAS or lib is None:
        return merge_tile_in_numpy(weight, delta, gain, out, measure=measure)
    rows, columns = weight.shape
    job = _Job(rows, columns, address(weight), out=address(out), measure=measure)
    if delta is not None:
        job.delta = address(delta)
    if gain is not None:
        job.gain = address(gain)
        job.gain_row = len(gain) == rows and gain.shape[1] == 1
        job.gain_step = gain.shape[1] == columns and columns > 1
    types = DTYPES[weight.dtype], DTYPES[out.dtype]
    lib.merge_tile(ISAS.index(kernel), *types, ctypes.byref(job))
    if not measure:
        return None
    weights, deltas, products, errors = job.sums
    return TileSums(weights, deltas, products, errors, job.changed, job.swallowed, job.clipped)


def merge_tile_in_numpy(
    weight: Array, delta: Array | None, gain: Array | None, out: Array, *, measure: bool = False
) -> TileSums | None:
    """Compute `merge_tile` without compiled code."""
    change = numpy.float32(0) if delta is None else delta
    out[...] = merged_values(weight, change, gain, out.dtype)
    if not measure:
        return None
    before = weight.astype(numpy.float32)
    with numpy.errstate(all="ignore"):
        total = _sum(weight, change, gain)
        exact = numpy.broadcast_to(change, before.shape) if gain is None else total - before
        effect = out.astype(numpy.float32) - before
        rest = effect - exact
        changed = exact != 0
        plain = merged_values(weight, numpy.float32(0), None, out.dtype)
        clipped = numpy.abs(total) > _FLOAT16_MAX if out.dtype == numpy.float16 else False
        return TileSums(
            weight=_dot(before, before),
            delta=_dot(exact, exact),
            product=_dot(effect, exact),
            error=_dot(rest, rest),
            changed=int(changed.sum()),
            swallowed=int((changed & (out == plain)).sum()),
            clipped=int(numpy.sum(clipped)),
        )


def merged_values(
    weight: Array, delta: Array | numpy.float32, gain: Array | None, dtype: numpy.dtype[Any]
) -> Array:
    """Return round(g · (w + d)): the merged weight in the dtype of the output.

    The weight is float32, bfloat16 or float16; delta and gain (DoRA's m / ‖W + D‖; None is 1) are
    float32 of shapes that broadcast. float16 saturates at ±65504; NaN stays NaN.

    Examples
    --------
    >>> one = numpy.ones(1, numpy.float32)
    >>> merged_values(one, one / 3, None, numpy.dtype(numpy.float16))
    array([1.333], dtype=float16)
    """
    with numpy.errstate(all="ignore"):
        total = _sum(weight, delta, gain)
        if dtype == numpy.float16:
            total.clip(-_FLOAT16_MAX, _FLOAT16_MAX, out=total)
        return total.astype(dtype)


def _sum(weight: Array, delta: Array | numpy.float32, gain: Array | None) -> Array:
    total = weight.astype(numpy.float32)
    total += delta
    if gain is not None:
        total *= gain
    return total


def _dot(one: Array, other: Array) -> float:
    return float(numpy.dot(one.reshape(-1), other.reshape(-1)))
