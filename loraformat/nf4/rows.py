"""Rows of a quantized matrix, decoded or multiplied in the calling thread."""

from __future__ import annotations

from typing import Any

import numpy

from loraformat.errors import UsageError
from loraformat.nf4 import kernels
from loraformat.nf4.kernels.native import DTYPES
from loraformat.nf4.quantized import NF4, check_array, element_range
from loraformat.tensors.arrays import Array, numpy_dtype

__all__ = ["dequantize_rows", "multiply_rows"]

_FLOAT32 = numpy_dtype("F32")


def dequantize_rows(q: NF4, out: Array, *, start: int = 0, stride: int | None = None) -> Array:
    """Decode a block of a matrix in the calling thread.

    Nothing is allocated, so that a thread that multiplies what it decodes has it in its cache.

    Parameters
    ----------
    q : NF4
        What to decode.
    out : array
        float32, float16 or bfloat16 (rows, columns), contiguous; written and returned.
    start : int
        Element of the flattened tensor at which the first row's part begins, anywhere in a block.
    stride : int, optional
        Elements from the beginning of one row's part to that of the next: columns of the whole
        matrix. Default: those of `out`.

    Returns
    -------
    array
        `out`; the bits of `dequantize`.

    Raises
    ------
    UsageError
        `out` does not fit, or reaches past the end.

    Examples
    --------
    >>> from loraformat.nf4.codec import quantize
    >>> x = numpy.array([[1.0, -1.0, 0.0], [0.0, 1.0, -1.0]], numpy.float32)
    >>> q = quantize(x, double_quant=False)
    >>> dequantize_rows(q, numpy.empty((2, 2), numpy.float32), start=1, stride=3).tolist()
    [[-1.0, 0.0], [1.0, -1.0]]
    """
    if out.ndim != 2 or out.dtype not in DTYPES:
        raise UsageError(
            f"NF4 decodes to rows of float32, float16 or bfloat16, not {out.dtype}{list(out.shape)}"
        )
    check_array("out", out, out.dtype, out.size)
    rows, columns = out.shape
    stride = columns if stride is None else stride
    if stride < columns:
        raise UsageError(f"rows of {columns} elements overlap, being {stride} apart")
    element_range(start, start + (rows - 1) * stride + columns if out.size else start, q.count)
    if out.size:
        kernels.active().dequantize_rows(q, start, stride, out)
    return out


def multiply_rows(
    q: NF4, x: Array, out: Array, *, start: int = 0, dtype: numpy.dtype[Any] = _FLOAT32
) -> Array:
    """Compute x Wᵀ for a few vectors in the calling thread, decoding W on the fly.

    Decoded numbers never leave the cache next to the processor. With one vector, as when text is
    generated, that is several times as fast as decoding and then multiplying; with more than a few
    it is slower.

    Parameters
    ----------
    q : NF4
        Holds the rows, one after the other.
    x : array
        float32 (vectors, columns), contiguous.
    out : array
        float32 (vectors, rows), maybe columns of a wider one; written and returned.
    start : int
        Element of the flattened tensor at which the first row begins.
    dtype : numpy.dtype
        float32, float16 or bfloat16: what a weight is rounded to before it is multiplied.

    Returns
    -------
    array
        `out`: products and sums in float32.

    Raises
    ------
    UsageError
        `x` or `out` does not fit, or rows reach past the end.

    Examples
    --------
    >>> from loraformat.nf4.codec import quantize
    >>> q = quantize(numpy.array([[1.0, -1.0], [0.0, 1.0]], numpy.float32), double_quant=False)
    >>> x, out = numpy.array([[2.0, 3.0]], numpy.float32), numpy.empty((1, 2), numpy.float32)
    >>> multiply_rows(q, x, out).tolist()
    [[-1.0, 3.0]]
    """
    if dtype not in DTYPES:
        raise UsageError(f"NF4 decodes to float32, float16 or bfloat16, not {dtype}")
    fits = x.ndim == out.ndim == 2 and len(x) == len(out)
    if not fits or (out.size and out.strides[1] != out.itemsize):
        raise UsageError(
            f"{list(x.shape)} numbers cannot be multiplied into {list(out.shape)}, wanted "
            "(vectors, columns) and (vectors, rows)"
        )
    check_array("x", x, _FLOAT32, x.size)
    if out.dtype != _FLOAT32:
        raise UsageError(f"products of NF4 are float32, not {out.dtype}")
    element_range(start, start + out.shape[1] * x.shape[1], q.count)
    if x.size == 0:
        out[...] = 0
        return out
    if out.size:
        kernels.active().multiply_rows(q, start, dtype, x, out)
    return out
