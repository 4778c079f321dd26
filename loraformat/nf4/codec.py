r"""NF4 quantization and dequantization.

The mathematics
---------------
A tensor is read in row-major order and cut into blocks of :math:`b` elements (the last may be
shorter). Block :math:`j` has the scale :math:`a_j = \max_{i \in j} |x_i|` (`absmax`), and

.. math:: c_i = \mathrm{nearest}_k\,(\ell_k, x_i / a_j), \qquad \hat x_i = \ell_{c_i} a_j

with 16 fixed levels :math:`\ell_0 = -1 < \dots < \ell_7 = 0 < \dots < \ell_{15} = 1`, the quantiles
of a normal distribution (Dettmers et al. 2023, "QLoRA", arXiv:2305.14314, section 3, equations 1
to 4, appendix E). *Double quantization* (same section) stores the scales in 8 bits:

.. math:: a_j = m_{q_j}\,\alpha_{\lfloor j / 256 \rfloor} + \mu

with the mean :math:`\mu` of all scales (`nested_offset`), the largest :math:`|a_j - \mu|` of each
256 (`nested_absmax`) and 256 fixed map entries :math:`m`.

To the last bit
---------------
All arithmetic is float32, each operation rounded to nearest even, none fused; float16 and bfloat16
are widened first, exactly.

* `Normalizing`: whole blocks multiply by ``1 / max(absmax, 1e-38)``; the shorter last block divides
  by ``max(absmax, 1e-38)``, and that maximum is what it stores. The scales are normalized by the
  same rule in blocks of 256, except that the plain maximum is stored.
* `Nearest`: code = number of midpoints ``(level[k] + level[k + 1]) / 2`` strictly below the
  normalized value: a tie goes to the lower code. The 8-bit codes likewise.
* `Packing`: the first of two elements is the high nibble; an odd count is padded with code 7.
* `Zero blocks`: code 7 (value 0), scale 0.
* `Offset`: absmax is summed in float64: each 256 in halves (first 128 + last 128, then 64 + 64,
  ..., absent ones zero), these sums exactly and rounded once; divided by the count in float64,
  then rounded to float32. No thread count changes it.
* `Decoding`: the scale is ``round(round(map * nested_absmax) + offset)``; a value is
  ``round(level * scale)``, then rounded to the dtype wanted.

These are the bits of bitsandbytes 0.50 (`nested_offset` may differ in the last place, where torch
sums in another order, and its C++ code for 8-bit codes is approximate).
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import numpy

from loraformat.errors import NonFiniteError, UsageError
from loraformat.nf4 import kernels
from loraformat.nf4.kernels.native import DTYPES
from loraformat.nf4.kernels.tables import from_bits
from loraformat.nf4.kernels.threads import run
from loraformat.nf4.quant_state import BLOCK_SIZES, NESTED_BLOCK_SIZE
from loraformat.nf4.quantized import NF4, ceil_div, check_array, check_block_size, element_range
from loraformat.nf4.tables import LEVEL_BITS, NESTED_MAP_BITS
from loraformat.tensors.arrays import Array, numpy_dtype

__all__ = [
    "BLOCK_SIZES",
    "LEVEL_BITS",
    "NESTED_BLOCK_SIZE",
    "NESTED_MAP_BITS",
    "NF4",
    "Elements",
    "bits_per_weight",
    "dequantize",
    "levels",
    "nested_map",
    "quantization_error",
    "quantize",
]


_FLOAT32, _BFLOAT16 = numpy_dtype("F32"), numpy_dtype("BF16")
_PIECE = 1 << 18  # elements per piece of work: whole blocks, whole error chunks, about 0.2 ms
_SCALES = 1 << 16  # scales per piece of work
_ERROR_CHUNK = 4096
_STREAM_BYTES = 1 << 21  # a whole tensor at least this large does not stay in a core's cache


def levels() -> Array:
    """Return the 16 levels.

    Returns
    -------
    array
        float32[16], ascending from -1 to 1, level 7 exactly zero.

    Examples
    --------
    >>> levels()[[0, 7, 8, 15]].tolist()
    [-1.0, 0.0, 0.07958029955625534, 1.0]
    """
    return from_bits(LEVEL_BITS)


def nested_map() -> Array:
    """Return the values that 8-bit scale codes stand for, before scaling.

    Returns
    -------
    array
        float32[256], ascending from -0.99296874 to 1, entry 127 exactly zero.

    Examples
    --------
    >>> nested_map()[[0, 127, 255]].tolist()
    [-0.992968738079071, 0.0, 1.0]
    """
    return from_bits(NESTED_MAP_BITS)


class Elements(Protocol):
    """Numbers of a tensor in row-major order, which slices of it read or compute."""

    @property
    def size(self) -> int:
        """How many."""

    @property
    def dtype(self) -> numpy.dtype[Any]:
        """Of each."""

    def __getitem__(self, piece: slice) -> Array:
        """Return some as a flat, contiguous array; several threads may call."""


def quantize(
    x: Array | Elements,
    *,
    block_size: int = 64,
    double_quant: bool = True,
    name: str = "tensor",
    threads: int | None = None,
) -> NF4:
    """Quantize a tensor: equations 1 to 4 of the paper.

    Parameters
    ----------
    x : array or Elements
        float32, float16 or bfloat16, of any shape.
    block_size : int
        One of `BLOCK_SIZES`.
    double_quant : bool
        Whether the scales become 8-bit codes.
    name : str
        Names the tensor in an error.
    threads : int, optional
        Default: every CPU of the process. The result does not depend on it.

    Returns
    -------
    NF4
        Rounding and ties: see the module's text.

    Raises
    ------
    NonFiniteError
        `x` holds a NaN or an infinity; names the first.
    UsageError
        The dtype or block size is not one of those above.

    Examples
    --------
    >>> q = quantize(numpy.array([0.5, -2.0, 1.0], numpy.float32), double_quant=False)
    >>> [f"{byte:02x}" for byte in q.packed.tolist()]
    ['a0', 'c7']
    """
    check_block_size(block_size)
    flat = _flat(x)
    count, kernel = flat.size, kernels.active()
    packed = numpy.empty(ceil_div(count, 2), numpy.uint8)
    absmax = numpy.empty(ceil_div(count, block_size), numpy.float32)

    def piece(start: int, stop: int) -> None:
        codes = packed[start // 2 : ceil_div(stop, 2)]
        scales = absmax[start // block_size : ceil_div(stop, block_size)]
        if not kernel.quantize(flat[start:stop], block_size, codes, scales):
            raise _non_finite(flat, name)

    run(piece, count, _PIECE, threads)
    if not double_quant:
        return NF4(packed, absmax, count, block_size)
    return NF4(packed, *_quantize_scales(kernel, absmax, count, block_size, threads))


def _quantize_scales(
    kernel: kernels.Kernel, absmax: Array, count: int, block_size: int, threads: int | None
) -> tuple[Array, int, int, Array, float]:
    blocks = absmax.size
    codes = numpy.empty(blocks, numpy.uint8)
    nested_absmax = numpy.empty(ceil_div(blocks, NESTED_BLOCK_SIZE), numpy.float32)
    sums = numpy.empty(nested_absmax.size)

    def add(start: int, stop: int) -> None:
        nested = slice(start // NESTED_BLOCK_SIZE, ceil_div(stop, NESTED_BLOCK_SIZE))
        kernel.sum_scales(absmax[start:stop], sums[nested])

    run(add, blocks, _SCALES, threads)
    offset = float(numpy.float32(math.fsum(sums.tolist()) / max(blocks, 1)))

    def encode(start: int, stop: int) -> None:
        nested = slice(start // NESTED_BLOCK_SIZE, ceil_div(stop, NESTED_BLOCK_SIZE))
        kernel.quantize_scales(absmax[start:stop], offset, codes[start:stop], nested_absmax[nested])

    run(encode, blocks, _SCALES, threads)
    return codes, count, block_size, nested_absmax, offset


def dequantize(
    q: NF4,
    *,
    dtype: numpy.dtype[Any] = _BFLOAT16,
    out: Array | None = None,
    start: int = 0,
    stop: int | None = None,
    scales: Array | None = None,
    threads: int | None = None,
) -> Array:
    """Decode elements [start, stop) of the flattened tensor.

    Most of the time of a decoder is spent on fresh memory: whoever decodes often passes `out`. A
    whole tensor of 2 MiB or more is written to it past the cache; a range is not, being read soon.

    Parameters
    ----------
    q : NF4
        What to decode.
    dtype : numpy.dtype
        float32, float16 or bfloat16; with `out`, its dtype is used instead.
    out : array, optional
        Contiguous, ``stop - start`` elements, any shape; written and returned.
    start, stop : int
        Element numbers, anywhere in a block; default: all.
    scales : array, optional
        ``q.scales()``, for a caller that decodes many ranges.
    threads : int, optional
        Default: every CPU of the process. The result does not depend on it.

    Returns
    -------
    array
        `out`, or a flat tensor. ``level * scale`` rounded to float32, then to the dtype, each to
        nearest even.

    Raises
    ------
    UsageError
        The range, `out` or `scales` does not fit.

    Examples
    --------
    >>> q = quantize(numpy.array([0.5, -2.0, 1.0], numpy.float32), double_quant=False)
    >>> dequantize(q, dtype=numpy.dtype("f4"), start=1).tolist()
    [-2.0, 0.8814196586608887]
    """
    start, stop = element_range(start, stop, q.count)
    streaming = out is not None and stop - start == q.count and out.nbytes >= _STREAM_BYTES
    if out is None:
        out = numpy.empty(stop - start, dtype)
    if out.dtype not in DTYPES:
        raise UsageError(f"NF4 decodes to float32, float16 or bfloat16, not {out.dtype}")
    check_array("out", out, out.dtype, stop - start)
    if scales is not None:
        check_array("scales", scales, _FLOAT32, q.blocks)
    target, kernel = out.reshape(-1), kernels.active()

    def piece(begin: int, end: int) -> None:
        first, last = (start + begin) // q.block_size, ceil_div(start + end, q.block_size)
        local = q.scales(first, last) if scales is None else scales[first:last]
        part = target[begin:end]
        kernel.dequantize(q.packed, local, q.block_size, start + begin, part, streaming)

    run(piece, stop - start, _PIECE, threads)
    return out


def quantization_error(
    x: Array | Elements, q: NF4, *, threads: int | None = None
) -> tuple[float, float]:
    """Return the squared quantization error and the squared norm.

    Parameters
    ----------
    x : array or Elements
        The original: float32, float16 or bfloat16, ``q.count`` elements.
    q : NF4
        Its quantized form.
    threads : int, optional
        Default: every CPU of the process. The result does not depend on it.

    Returns
    -------
    tuple of float
        The sums of (x - value)² and of x². Differences and values are rounded to float32, squares
        are exact; each 4096 elements are summed in float64 in 16 lanes (element i in lane i % 16;
        four neighbours of a lane in pairs, these sums in order, then lanes in halves), and these
        sums exactly.

    Raises
    ------
    UsageError
        `x` does not have ``q.count`` elements of a supported dtype.

    Examples
    --------
    >>> x = numpy.linspace(-1, 1, 4096, dtype=numpy.float32)
    >>> error, square = quantization_error(x, quantize(x))
    >>> round((error / square) ** 0.5, 4)
    0.0292
    """
    flat, kernel, scales = _flat(x), kernels.active(), q.scales()
    if flat.size != q.count:
        raise UsageError(f"NF4 x has {flat.size} elements, wanted {q.count}")
    sums = numpy.empty((2, ceil_div(q.count, _ERROR_CHUNK)))

    def piece(start: int, stop: int) -> None:
        chunks = slice(start // _ERROR_CHUNK, ceil_div(stop, _ERROR_CHUNK))
        packed, local = q.packed[start // 2 :], scales[start // q.block_size :]
        kernel.error(flat[start:stop], packed, local, q.block_size, sums[:, chunks])

    run(piece, q.count, _PIECE, threads)
    return math.fsum(sums[0].tolist()), math.fsum(sums[1].tolist())


def bits_per_weight(block_size: int = 64, double_quant: bool = True) -> float:
    """Compute the storage of a large tensor, in bits per element.

    Parameters
    ----------
    block_size : int
        One of `BLOCK_SIZES`.
    double_quant : bool
        Whether scales take 8 bits and 32 per 256, or 32 bits.

    Returns
    -------
    float
        Without the few constant bytes of headers and tables.

    Raises
    ------
    UsageError
        Unknown block size.

    Examples
    --------
    >>> bits_per_weight(), bits_per_weight(double_quant=False)
    (4.126953125, 4.5)
    """
    check_block_size(block_size)
    scale = 8 + 32 / NESTED_BLOCK_SIZE if double_quant else 32
    return 4 + scale / block_size


def _flat(x: Array | Elements) -> Array | Elements:
    if x.dtype not in DTYPES:
        raise UsageError(f"NF4 encodes float32, float16 or bfloat16, not {x.dtype}")
    return numpy.ascontiguousarray(x).reshape(-1) if isinstance(x, numpy.ndarray) else x


def _non_finite(flat: Array | Elements, name: str) -> NonFiniteError:
    for start in range(0, flat.size, _PIECE):
        values = flat[start : start + _PIECE]
        bad = numpy.flatnonzero(~numpy.isfinite(values))
        if bad.size:
            return NonFiniteError(name, start + int(bad[0]), float(values[bad[0]]))
    raise AssertionError("a kernel reported a non-finite value where there is none")
