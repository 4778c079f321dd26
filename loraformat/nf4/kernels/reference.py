"""Reference kernels in numpy: the fallback without a compiler, and the test oracle.

Everything runs in tiles that fit the cache; `loraformat.nf4.kernels.threads` parallelizes.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy

from loraformat.algebra.row_tiles import row_tiles
from loraformat.nf4.kernels.tables import tables
from loraformat.tensors.arrays import Array

if TYPE_CHECKING:
    from loraformat.nf4.quantized import NF4

__all__ = ["ReferenceKernel"]

_TINY = numpy.float32(1e-38)
_NESTED = 256
_CHUNK = 4096
_TILE = 1 << 16
_PRODUCT_TILE = 1 << 20


def _float32(x: Array) -> Array:
    return x.astype(numpy.float32, copy=False)


def _normalized(blocks: Array, largest: Array) -> Array:
    """Scale rows to [-1, 1], by the reciprocal of their largest magnitude."""
    inverse = numpy.float32(1) / numpy.maximum(largest, _TINY)
    return (blocks * inverse[:, None]).reshape(-1)


def _nested_codes(s: Array) -> Array:
    """Turn normalized scales into 8-bit codes, by the leading bits of the float."""
    t = tables()
    base: Array = t.nested_base[(s.view(numpy.uint32) >> 17) & 0x7FFF]
    base += s > t.nested_bounds[base]
    return base


def _fold(x: Array) -> Array:
    """Sum dimension 0, of a power of two, in halves: (128 + 128), (64 + 64), ..."""
    while len(x) > 1:
        x = x[: len(x) // 2] + x[len(x) // 2 :]
    folded: Array = x[0]
    return folded


class ReferenceKernel:
    """The `loraformat.nf4.kernels.Kernel` methods in numpy."""

    name = "numpy"

    def __init__(self) -> None:
        levels = tables().levels
        # Both levels of a byte as one 8-byte item, so that one look-up fetches two.
        pairs = numpy.stack([numpy.repeat(levels, 16), numpy.tile(levels, 16)], 1)
        self._levels = pairs.view(numpy.int64).reshape(-1)

    def quantize(self, x: Array, block_size: int, packed: Array, absmax: Array) -> bool:
        """See `Kernel.quantize`."""
        whole = x.size - x.size % block_size
        for start in range(0, whole, _TILE):
            stop = min(start + _TILE, whole)
            blocks = _float32(x[start:stop]).reshape(-1, block_size)
            largest = absmax[start // block_size : stop // block_size]
            numpy.amax(numpy.abs(blocks), 1, out=largest)
            if not numpy.isfinite(largest).all():
                return False
            _encode(_normalized(blocks, largest), packed[start // 2 : stop // 2])
        if whole < x.size:
            tail = _float32(x[whole:])
            largest = absmax[-1:]
            numpy.amax(numpy.abs(tail), keepdims=True, out=largest)
            if not numpy.isfinite(largest).all():
                return False
            numpy.maximum(largest, _TINY, out=largest)
            tail = numpy.pad(tail / largest, (0, tail.size % 2))
            _encode(tail, packed[whole // 2 :])
        return True

    def sum_scales(self, absmax: Array, sums: Array) -> None:
        """See `Kernel.sum_scales`."""
        padded = numpy.zeros(sums.size * _NESTED)
        padded[: absmax.size] = absmax
        sums[:] = _fold(padded.reshape(-1, _NESTED).T)

    def quantize_scales(
        self, absmax: Array, offset: float, codes: Array, nested_absmax: Array
    ) -> None:
        """See `Kernel.quantize_scales`."""
        d = absmax - numpy.float32(offset)
        whole = d.size - d.size % _NESTED
        blocks, last = d[:whole].reshape(-1, _NESTED), d[whole:]
        largest = nested_absmax[: len(blocks)]
        numpy.amax(numpy.abs(blocks), 1, out=largest)
        codes[:whole] = _nested_codes(_normalized(blocks, largest))
        if last.size:
            nested_absmax[-1] = numpy.abs(last).max()
            codes[whole:] = _nested_codes(last / numpy.maximum(nested_absmax[-1], _TINY))

    def decode_scales(
        self, codes: Array, nested_absmax: Array, offset: float, start: int, out: Array
    ) -> None:
        """See `Kernel.decode_scales`."""
        stop = start + out.size
        outer = nested_absmax[start // _NESTED : -(-stop // _NESTED)].repeat(_NESTED)
        numpy.take(tables().nested_map, codes[start:stop], out=out)
        out *= outer[start % _NESTED :][: out.size]
        out += numpy.float32(offset)

    def dequantize(
        self, packed: Array, scales: Array, block_size: int, start: int, out: Array, streaming: bool
    ) -> None:
        """See `Kernel.dequantize`."""
        del streaming
        skip = start % block_size
        if skip:  # the rest of a block, by way of the whole of it
            block = numpy.empty(min(block_size, skip + out.size), out.dtype)
            _decode(self._levels, packed[(start - skip) // 2 :], scales[:1], block_size, block)
            head = block.size - skip
            out[:head] = block[skip:]
            start, scales, out = start + head, scales[1:], out[head:]
        codes = packed[start // 2 :]
        for first in range(0, out.size, _TILE):
            part = out[first : first + _TILE]
            factors = scales[first // block_size : -(-(first + part.size) // block_size)]
            _decode(self._levels, codes[first // 2 :], factors, block_size, part)

    def dequantize_rows(self, q: NF4, start: int, stride: int, out: Array) -> None:
        """See `Kernel.dequantize_rows`."""
        packed, block_size = q.packed, q.block_size
        rows, columns = out.shape
        if columns == stride or rows == 1:
            scales = q.scales(start // block_size, -(-(start + out.size) // block_size))
            self.dequantize(packed, scales, block_size, start, out.reshape(-1), False)
            return
        # Parts of blocks, all of one length, that no row's end and no block's end falls into.
        size = math.gcd(block_size, start, stride, columns)
        elements = start + stride * numpy.arange(rows)[:, None] + numpy.arange(0, columns, size)
        blocks = elements // block_size
        scales = q.absmax[blocks]
        if q.nested_absmax is not None:
            scales = tables().nested_map[scales] * q.nested_absmax[blocks // _NESTED]
            scales += numpy.float32(q.nested_offset)
        if size == 1:
            numbers = packed[elements // 2] >> (4 - elements % 2 * 4).astype(numpy.uint8) & 15
            _store(out, tables().levels[numbers] * scales)
            return
        part = numpy.lib.stride_tricks.as_strided(
            packed[start // 2 :], (rows, columns // 2), (stride // 2, 1), writeable=False
        )
        self.dequantize(part.reshape(-1), scales.reshape(-1), size, 0, out.reshape(-1), False)

    def multiply_rows(
        self, q: NF4, start: int, dtype: numpy.dtype[Any], x: Array, out: Array
    ) -> None:
        """See `Kernel.multiply_rows`."""
        rows, columns = out.shape[1], x.shape[1]
        for first, last in row_tiles(rows, columns, _PRODUCT_TILE):
            block = numpy.empty((last - first, columns), dtype)
            self.dequantize_rows(q, start + first * columns, columns, block)
            out[:, first:last] = x @ _float32(block).T

    def error(self, x: Array, packed: Array, scales: Array, block_size: int, sums: Array) -> None:
        """See `Kernel.error`."""
        for start in range(0, x.size, _TILE):
            wide = _float32(x[start : start + _TILE])
            value = numpy.empty(wide.size, numpy.float32)
            self.dequantize(packed, scales[start // block_size :], block_size, start, value, False)
            first, last = start // _CHUNK, -(-(start + wide.size) // _CHUNK)
            squares = numpy.zeros((2, (last - first) * _CHUNK))
            for row, numbers in zip(squares, (wide - value, wide), strict=True):
                row[: wide.size] = numbers
            squares *= squares
            # The order of nf4_body.h: 16 lanes, four rows in pairs, then in order, lanes in halves.
            rows = squares.reshape(2, last - first, _CHUNK // 64, 4, 16)
            groups = (rows[..., 0, :] + rows[..., 1, :]) + (rows[..., 2, :] + rows[..., 3, :])
            lanes = numpy.zeros((2, last - first, 16))
            for group in range(groups.shape[2]):
                lanes += groups[:, :, group]
            sums[:, first:last] = _fold(lanes.transpose(2, 0, 1))


def _encode(s: Array, packed: Array) -> None:
    """Pack the codes of an even number of normalized values, the first in the high nibble."""
    t = tables()
    bins = (s * numpy.float32(15.5) + numpy.float32(15.5)).astype(numpy.int8)
    codes = t.bin_code.astype(numpy.uint8)[bins]
    codes += s > t.bin_threshold[bins]
    numpy.add(codes[::2] << 4, codes[1::2], out=packed)


def _decode(levels: Array, packed: Array, scales: Array, block_size: int, out: Array) -> None:
    """Decode a tile that starts at a block."""
    count = out.size
    values = levels[packed[: (count + 1) // 2]].view(numpy.float32)[:count]
    if count % block_size:
        values *= scales.repeat(block_size)[:count]
    else:
        values.reshape(-1, block_size)[:] *= scales[:, None]
    _store(out, values)


def _store(out: Array, values: Array) -> None:
    """Round float32 to the dtype of `out`, to nearest even; beyond float16's range to infinity."""
    with numpy.errstate(over="ignore"):
        out[...] = values
