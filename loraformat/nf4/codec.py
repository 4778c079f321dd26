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
from dataclasses import dataclass

import torch
from torch import Tensor

from loraformat.errors import NonFiniteError, UsageError
from loraformat.nf4 import kernels
from loraformat.nf4.kernels.tables import from_bits
from loraformat.nf4.kernels.threads import run
from loraformat.nf4.tables import LEVEL_BITS, NESTED_MAP_BITS

__all__ = [
    "BLOCK_SIZES",
    "LEVEL_BITS",
    "NESTED_BLOCK_SIZE",
    "NESTED_MAP_BITS",
    "NF4",
    "bits_per_weight",
    "dequantize",
    "dequantize_rows",
    "levels",
    "multiply_rows",
    "nested_map",
    "quantization_error",
    "quantize",
]

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCK_SIZE = 256

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_PIECE = 1 << 18  # elements per piece of work: whole blocks, whole error chunks, about 0.2 ms
_SCALES = 1 << 16  # scales per piece of work
_ERROR_CHUNK = 4096
_STREAM_BYTES = 1 << 21  # a whole tensor at least this large does not stay in a core's cache


def levels() -> Tensor:
    """Return the 16 levels.

    Returns
    -------
    Tensor
        float32[16], ascending from -1 to 1, level 7 exactly zero.

    Examples
    --------
    >>> levels()[[0, 7, 8, 15]].tolist()
    [-1.0, 0.0, 0.07958029955625534, 1.0]
    """
    return from_bits(LEVEL_BITS)


def nested_map() -> Tensor:
    """Return the values that 8-bit scale codes stand for, before scaling.

    Returns
    -------
    Tensor
        float32[256], ascending from -0.99296874 to 1, entry 127 exactly zero.

    Examples
    --------
    >>> nested_map()[[0, 127, 255]].tolist()
    [-0.992968738079071, 0.0, 1.0]
    """
    return from_bits(NESTED_MAP_BITS)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True, eq=False)
class NF4:
    """One quantized tensor; its tensors are on the CPU, contiguous, maybe views of a mapped file.

    Attributes
    ----------
    packed : Tensor
        uint8[ceil(count / 2)]: two codes per byte, the first in the high nibble.
    absmax : Tensor
        One per block: uint8 codes if double-quantized, else the float32 scales.
    count : int
        Elements.
    block_size : int
        Elements per block, one of `BLOCK_SIZES`.
    nested_absmax : Tensor or None
        float32[ceil(blocks / 256)] if double-quantized.
    nested_offset : float or None
        A float32 number if double-quantized.

    Raises
    ------
    UsageError
        A length, dtype or layout does not fit the others.
    """

    packed: Tensor
    absmax: Tensor
    count: int
    block_size: int = 64
    nested_absmax: Tensor | None = None
    nested_offset: float | None = None

    def __post_init__(self) -> None:
        _check_block_size(self.block_size)
        if self.count < 0 or (self.nested_absmax is None) != (self.nested_offset is None):
            raise UsageError("NF4 wants count >= 0, and nested_absmax with nested_offset")
        _check("packed", self.packed, torch.uint8, _ceil(self.count, 2))
        scale = torch.uint8 if self.double_quant else torch.float32
        _check("absmax", self.absmax, scale, self.blocks)
        if self.nested_absmax is not None:
            nested = _ceil(self.blocks, NESTED_BLOCK_SIZE)
            _check("nested_absmax", self.nested_absmax, torch.float32, nested)

    @property
    def blocks(self) -> int:
        """Number of blocks, the incomplete one included."""
        return _ceil(self.count, self.block_size)

    @property
    def double_quant(self) -> bool:
        """Whether the scales are stored as 8-bit codes."""
        return self.nested_absmax is not None

    def scales(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Decode the scales of blocks [start, stop).

        Parameters
        ----------
        start, stop : int
            Block numbers; default: all blocks.

        Returns
        -------
        Tensor
            float32[stop - start]: absmax itself, or
            ``round(round(map[absmax] * nested_absmax[block // 256]) + nested_offset)``.

        Examples
        --------
        >>> q = quantize(torch.tensor([0.5, -2.0, 1.0]), double_quant=False)
        >>> q.scales().tolist()
        [2.0]
        """
        start, stop = _range(start, stop, self.blocks)
        nested, offset = self.nested_absmax, self.nested_offset
        if nested is None or offset is None:
            return self.absmax[start:stop]
        out = torch.empty(stop - start, dtype=torch.float32, device="cpu")
        kernels.active().decode_scales(self.absmax, nested, offset, start, out)
        return out


def quantize(
    x: Tensor,
    *,
    block_size: int = 64,
    double_quant: bool = True,
    name: str = "tensor",
    threads: int | None = None,
) -> NF4:
    """Quantize a tensor: equations 1 to 4 of the paper.

    Parameters
    ----------
    x : Tensor
        float32, float16 or bfloat16 on the CPU, of any shape.
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
        The dtype, device or block size is not one of those above.

    Examples
    --------
    >>> q = quantize(torch.tensor([0.5, -2.0, 1.0]), double_quant=False)
    >>> [f"{byte:02x}" for byte in q.packed.tolist()]
    ['a0', 'c7']
    """
    _check_block_size(block_size)
    flat = _flat(x)
    count, kernel = flat.numel(), kernels.active()
    packed = torch.empty(_ceil(count, 2), dtype=torch.uint8, device="cpu")
    absmax = torch.empty(_ceil(count, block_size), dtype=torch.float32, device="cpu")

    def piece(start: int, stop: int) -> None:
        codes = packed[start // 2 : _ceil(stop, 2)]
        scales = absmax[start // block_size : _ceil(stop, block_size)]
        if not kernel.quantize(flat[start:stop], block_size, codes, scales):
            raise _non_finite(flat, name)

    run(piece, count, _PIECE, threads, in_torch=kernel.name == "torch")
    if not double_quant:
        return NF4(packed, absmax, count, block_size)
    return NF4(packed, *_quantize_scales(kernel, absmax, count, block_size, threads))


def _quantize_scales(
    kernel: kernels.Kernel, absmax: Tensor, count: int, block_size: int, threads: int | None
) -> tuple[Tensor, int, int, Tensor, float]:
    blocks = absmax.numel()
    codes = absmax.new_empty(blocks, dtype=torch.uint8)
    nested_absmax = absmax.new_empty(_ceil(blocks, NESTED_BLOCK_SIZE))
    sums = absmax.new_empty(nested_absmax.numel(), dtype=torch.float64)

    def add(start: int, stop: int) -> None:
        nested = slice(start // NESTED_BLOCK_SIZE, _ceil(stop, NESTED_BLOCK_SIZE))
        kernel.sum_scales(absmax[start:stop], sums[nested])

    run(add, blocks, _SCALES, threads, in_torch=kernel.name == "torch")
    offset = absmax.new_tensor(math.fsum(sums.tolist()) / max(blocks, 1)).item()

    def encode(start: int, stop: int) -> None:
        nested = slice(start // NESTED_BLOCK_SIZE, _ceil(stop, NESTED_BLOCK_SIZE))
        kernel.quantize_scales(absmax[start:stop], offset, codes[start:stop], nested_absmax[nested])

    run(encode, blocks, _SCALES, threads, in_torch=kernel.name == "torch")
    return codes, count, block_size, nested_absmax, offset


def dequantize(
    q: NF4,
    *,
    dtype: torch.dtype = torch.bfloat16,
    out: Tensor | None = None,
    start: int = 0,
    stop: int | None = None,
    scales: Tensor | None = None,
    threads: int | None = None,
) -> Tensor:
    """Decode elements [start, stop) of the flattened tensor.

    Most of the time of a decoder is spent on fresh memory: whoever decodes often passes `out`. A
    whole tensor of 2 MiB or more is written to it past the cache; a range is not, being read soon.

    Parameters
    ----------
    q : NF4
        What to decode.
    dtype : torch.dtype
        float32, float16 or bfloat16; with `out`, its dtype is used instead.
    out : Tensor, optional
        Contiguous, ``stop - start`` elements, any shape; written and returned.
    start, stop : int
        Element numbers, anywhere in a block; default: all.
    scales : Tensor, optional
        ``q.scales()``, for a caller that decodes many ranges.
    threads : int, optional
        Default: every CPU of the process. The result does not depend on it.

    Returns
    -------
    Tensor
        `out`, or a flat tensor. ``level * scale`` rounded to float32, then to the dtype, each to
        nearest even.

    Raises
    ------
    UsageError
        The range, `out` or `scales` does not fit.

    Examples
    --------
    >>> q = quantize(torch.tensor([0.5, -2.0, 1.0]), double_quant=False)
    >>> dequantize(q, dtype=torch.float32, start=1).tolist()
    [-2.0, 0.8814196586608887]
    """
    start, stop = _range(start, stop, q.count)
    streaming = out is not None and stop - start == q.count and out.nbytes >= _STREAM_BYTES
    if out is None:
        out = torch.empty(stop - start, dtype=dtype, device="cpu")
    if out.dtype not in _DTYPES:
        raise UsageError(f"NF4 decodes to float32, float16 or bfloat16, not {out.dtype}")
    _check("out", out, out.dtype, stop - start)
    if scales is not None:
        _check("scales", scales, torch.float32, q.blocks)
    target, kernel = out.view(-1), kernels.active()

    def piece(begin: int, end: int) -> None:
        first, last = (start + begin) // q.block_size, _ceil(start + end, q.block_size)
        local = q.scales(first, last) if scales is None else scales[first:last]
        part = target[begin:end]
        kernel.dequantize(q.packed, local, q.block_size, start + begin, part, streaming)

    run(piece, stop - start, _PIECE, threads, in_torch=kernel.name == "torch")
    return out


def dequantize_rows(q: NF4, out: Tensor, *, start: int = 0, stride: int | None = None) -> Tensor:
    """Decode a part of each of some rows, in the calling thread: a block of a matrix.

    Nothing is allocated, so that a thread that multiplies what it decodes has it in its cache.

    Parameters
    ----------
    q : NF4
        What to decode.
    out : Tensor
        float32, float16 or bfloat16 (rows, columns), contiguous; written and returned.
    start : int
        Element of the flattened tensor at which the first row's part begins, anywhere in a block.
    stride : int, optional
        Elements from the beginning of one row's part to that of the next: columns of the whole
        matrix. Default: those of `out`.

    Returns
    -------
    Tensor
        `out`; the bits of `dequantize`.

    Raises
    ------
    UsageError
        `out` does not fit, or reaches past the end.

    Examples
    --------
    >>> q = quantize(torch.tensor([[1.0, -1.0, 0.0], [0.0, 1.0, -1.0]]), double_quant=False)
    >>> dequantize_rows(q, torch.empty(2, 2), start=1, stride=3).tolist()
    [[-1.0, 0.0], [1.0, -1.0]]
    """
    if out.dim() != 2 or out.dtype not in _DTYPES:
        raise UsageError(
            f"NF4 decodes to rows of float32, float16 or bfloat16, not {out.dtype}{list(out.shape)}"
        )
    _check("out", out, out.dtype, out.numel())
    rows, columns = out.shape
    stride = columns if stride is None else stride
    if stride < columns:
        raise UsageError(f"rows of {columns} elements overlap, being {stride} apart")
    _range(start, start + (rows - 1) * stride + columns if out.numel() else start, q.count)
    if out.numel():
        kernels.active().dequantize_rows(_codes(q), start, stride, out)
    return out


def multiply_rows(
    q: NF4, x: Tensor, out: Tensor, *, start: int = 0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Multiply a few vectors by rows of a matrix, in the calling thread: x Wᵀ, as it is decoded.

    Decoded numbers never leave the cache next to the processor. With one vector, as when text is
    generated, that is several times as fast as decoding and then multiplying; with more than a few
    it is slower.

    Parameters
    ----------
    q : NF4
        Holds the rows, one after the other.
    x : Tensor
        float32 (vectors, columns), contiguous.
    out : Tensor
        float32 (vectors, rows), maybe columns of a wider one; written and returned.
    start : int
        Element of the flattened tensor at which the first row begins.
    dtype : torch.dtype
        float32, float16 or bfloat16: what a weight is rounded to before it is multiplied.

    Returns
    -------
    Tensor
        `out`: products and sums in float32.

    Raises
    ------
    UsageError
        `x` or `out` does not fit, or rows reach past the end.

    Examples
    --------
    >>> q = quantize(torch.tensor([[1.0, -1.0], [0.0, 1.0]]), double_quant=False)
    >>> multiply_rows(q, torch.tensor([[2.0, 3.0]]), torch.empty(1, 2)).tolist()
    [[-1.0, 3.0]]
    """
    if dtype not in _DTYPES:
        raise UsageError(f"NF4 decodes to float32, float16 or bfloat16, not {dtype}")
    if x.dim() != 2 or out.dim() != 2 or len(x) != len(out) or (out.numel() and out.stride(1) != 1):
        raise UsageError(
            f"{list(x.shape)} numbers cannot be multiplied into {list(out.shape)}, wanted "
            "(vectors, columns) and (vectors, rows)"
        )
    _check("x", x, torch.float32, x.numel())
    if out.dtype != torch.float32 or out.device.type != "cpu":
        raise UsageError(f"products of NF4 are float32 on cpu, not {out.dtype} on {out.device}")
    _range(start, start + out.shape[1] * x.shape[1], q.count)
    if x.numel() == 0:
        return out.zero_()
    if out.numel():
        kernels.active().multiply_rows(_codes(q), start, dtype, x, out)
    return out


def _codes(q: NF4) -> kernels.Codes:
    offset = q.nested_offset or 0.0
    return kernels.Codes(q.packed, q.absmax, q.nested_absmax, offset, q.block_size)


def quantization_error(x: Tensor, q: NF4, *, threads: int | None = None) -> tuple[float, float]:
    """Measure what quantization lost; sqrt(first / second) is the relative RMS error.

    Parameters
    ----------
    x : Tensor
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
    >>> x = torch.linspace(-1, 1, 4096)
    >>> error, square = quantization_error(x, quantize(x))
    >>> round((error / square) ** 0.5, 4)
    0.0292
    """
    flat, kernel, scales = _flat(x), kernels.active(), q.scales()
    _check("x", flat, flat.dtype, q.count)
    sums = torch.empty(2, _ceil(q.count, _ERROR_CHUNK), dtype=torch.float64, device="cpu")

    def piece(start: int, stop: int) -> None:
        chunks = slice(start // _ERROR_CHUNK, _ceil(stop, _ERROR_CHUNK))
        packed, local = q.packed[start // 2 :], scales[start // q.block_size :]
        kernel.error(flat[start:stop], packed, local, q.block_size, sums[:, chunks])

    run(piece, q.count, _PIECE, threads, in_torch=kernel.name == "torch")
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
    _check_block_size(block_size)
    scale = 8 + 32 / NESTED_BLOCK_SIZE if double_quant else 32
    return 4 + scale / block_size


def _check_block_size(block_size: int) -> None:
    if block_size not in BLOCK_SIZES:
        raise UsageError(
            f"block size {block_size} is not one of {', '.join(map(str, BLOCK_SIZES))}"
        )


def _check(what: str, tensor: Tensor, dtype: torch.dtype, count: int) -> None:
    """Refuse what a kernel would read or write past the end of."""
    if (
        tensor.dtype != dtype
        or tensor.numel() != count
        or not tensor.is_contiguous()
        or tensor.device.type != "cpu"
    ):
        raise UsageError(
            f"NF4 {what} is {tensor.dtype}{list(tensor.shape)} on {tensor.device}, wanted "
            f"{count} elements of {dtype}, contiguous, on cpu"
        )


def _range(start: int, stop: int | None, count: int) -> tuple[int, int]:
    stop = count if stop is None else stop
    if not 0 <= start <= stop <= count:
        raise UsageError(f"range [{start}, {stop}) is not inside [0, {count})")
    return start, stop


def _flat(x: Tensor) -> Tensor:
    if x.dtype not in _DTYPES or x.device.type != "cpu":
        raise UsageError(
            f"NF4 encodes float32, float16 or bfloat16 on cpu, not {x.dtype} on {x.device}"
        )
    return x.detach().contiguous().view(-1)


def _non_finite(flat: Tensor, name: str) -> NonFiniteError:
    for start in range(0, flat.numel(), _PIECE):
        bad = flat[start : start + _PIECE].isfinite().logical_not_().nonzero()
        if bad.numel():
            position = start + int(bad[0])
            return NonFiniteError(name, position, float(flat[position]))
    raise AssertionError("a kernel reported a non-finite value where there is none")
