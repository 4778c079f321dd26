"""Reference kernels in torch: the fallback without a compiler, and the test oracle.

Everything runs in tiles that fit the cache; `loraformat.nf4.kernels.threads` parallelizes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from loraformat.algebra.row_tiles import row_tiles
from loraformat.nf4.kernels.codes import Codes
from loraformat.nf4.kernels.tables import tables

__all__ = ["ReferenceKernel"]

_TINY = 1e-38
_NESTED = 256
_CHUNK = 4096
_ERROR_STEP = 1 << 16
_PRODUCT_TILE = 1 << 20

#: Whatever the program's default dtype and default device are.
_NUMBERS: Any = {"dtype": torch.float32, "device": "cpu"}


def _tile() -> int:
    """Choose the elements per step: few enough for torch not to start OpenMP threads of its own."""
    return 1 << 17 if torch.get_num_threads() == 1 else 1 << 15


def _pair_tables() -> tuple[Tensor, Tensor]:
    """Both thresholds and the packed codes below them, by the bins of two neighbours.

    The index is ``bin of the first + 256 * bin of the second``: two int8 read as one int16. One
    8-byte look-up then does the work of two 4-byte ones.
    """
    t = tables()
    thresholds = torch.zeros(32, 256, 2, **_NUMBERS)
    thresholds[:, :32, 0] = t.bin_threshold
    thresholds[:, :32, 1] = t.bin_threshold[:, None]
    codes = torch.zeros(32, 256, dtype=torch.int32, device="cpu")
    codes[:, :32] = t.bin_code * 16 + t.bin_code[:, None]
    return thresholds.flatten().view(torch.int64), codes.to(torch.uint8).flatten()


def _nested_codes(s: Tensor) -> Tensor:
    """Turn normalized scales into 8-bit codes, by the leading bits of the float."""
    t = tables()
    key = (s.view(torch.int32) >> 17).bitwise_and_(0x7FFF)
    base = t.nested_base.index_select(0, key)
    return base + (s > t.nested_bounds.index_select(0, base.int()))


def _fold(x: Tensor, width: int) -> Tensor:
    """Sum dimension 0, of length `width`, in halves: (128 + 128), (64 + 64), ..."""
    while width > 1:
        width //= 2
        x = x[:width] + x[width:]
    return x[0]


class ReferenceKernel:
    """The `loraformat.nf4.kernels.Kernel` methods in torch."""

    name = "torch"

    def __init__(self) -> None:
        pairs = torch.cartesian_prod(tables().levels, tables().levels)
        # Both levels of a byte as one 8-byte item, so that one look-up fetches two.
        self._levels = pairs.contiguous().view(torch.int64).flatten()
        self._thresholds, self._codes = _pair_tables()
        self._bins = torch.tensor(15.5, **_NUMBERS)

    def quantize(self, x: Tensor, block_size: int, packed: Tensor, absmax: Tensor) -> bool:
        """See `Kernel.quantize`."""
        whole, tile = x.numel() - x.numel() % block_size, _tile()
        tiles = zip(
            torch.split(x[:whole], tile),
            torch.split(packed[: whole // 2], tile // 2),
            torch.split(absmax[: whole // block_size], tile // block_size),
            strict=True,
        )
        for values, codes, largest in tiles if whole else ():
            blocks = values.float().view(-1, block_size)
            torch.amax(blocks.abs(), 1, out=largest)
            if not largest.amax().item() < torch.inf:
                return False
            inverse = largest.clamp(min=_TINY).reciprocal_()
            self._encode((blocks * inverse[:, None]).flatten(), codes)
        if whole < x.numel():
            return self._quantize_tail(x[whole:].float(), packed[whole // 2 :], absmax[-1:])
        return True

    def _encode(self, s: Tensor, packed: Tensor) -> None:
        """Pack the codes of an even number of normalized values."""
        bins = torch.add(self._bins, s, alpha=15.5).to(torch.int8).view(torch.int16).int()
        thresholds = self._thresholds.index_select(0, bins).view(torch.float32)
        above = torch.gt(s, thresholds, out=thresholds).to(torch.int8).view(torch.int16)
        # first + 256 * second -> 16 * first + second
        above = above.mul_(4097).bitwise_right_shift_(8)
        torch.add(self._codes.index_select(0, bins), above.to(torch.uint8), out=packed)

    def _quantize_tail(self, x: Tensor, packed: Tensor, absmax: Tensor) -> bool:
        torch.amax(x.abs(), 0, keepdim=True, out=absmax)
        if not absmax.item() < torch.inf:
            return False
        absmax.clamp_(min=_TINY)
        self._encode(torch.cat([x / absmax, x.new_zeros(x.numel() % 2)]), packed)
        return True

    def sum_scales(self, absmax: Tensor, sums: Tensor) -> None:
        """See `Kernel.sum_scales`."""
        padded = sums.new_zeros(sums.numel() * _NESTED)
        padded[: absmax.numel()] = absmax
        sums.copy_(_fold(padded.view(-1, _NESTED).T, _NESTED))

    def quantize_scales(
        self, absmax: Tensor, offset: float, codes: Tensor, nested_absmax: Tensor
    ) -> None:
        """See `Kernel.quantize_scales`."""
        whole, tile = absmax.numel() - absmax.numel() % _NESTED, _tile()
        for start in range(0, whole, tile):
            stop = min(start + tile, whole)
            d = absmax[start:stop].sub(offset).view(-1, _NESTED)
            largest = d.abs().amax(1)
            nested_absmax[start // _NESTED : stop // _NESTED] = largest
            inverse = largest.clamp_(min=_TINY).reciprocal_()
            codes[start:stop] = _nested_codes((d * inverse[:, None]).flatten())
        if whole < absmax.numel():
            d = absmax[whole:] - offset
            largest = d.abs().amax(0, keepdim=True)
            nested_absmax[-1:] = largest
            codes[whole:] = _nested_codes(d / largest.clamp_(min=_TINY))

    def decode_scales(
        self, codes: Tensor, nested_absmax: Tensor, offset: float, start: int, out: Tensor
    ) -> None:
        """See `Kernel.decode_scales`."""
        tile = _tile()
        for first in range(start, start + out.numel(), tile):
            last = min(first + tile, start + out.numel())
            entries = tables().nested_map.index_select(0, codes[first:last].int())
            outer = nested_absmax[first // _NESTED : -(-last // _NESTED)].repeat_interleave(_NESTED)
            outer = outer[first % _NESTED :][: last - first]
            torch.add(entries.mul_(outer), offset, out=out[first - start : last - start])

    def dequantize(
        self,
        packed: Tensor,
        scales: Tensor,
        block_size: int,
        start: int,
        out: Tensor,
        streaming: bool,
    ) -> None:
        """See `Kernel.dequantize`."""
        del streaming
        skip, tile = start % block_size, _tile()
        scratch = torch.empty(min(out.numel() + skip + 1, tile), **_NUMBERS)
        if skip:  # the rest of a block, by way of the whole of it
            block = out.new_empty(min(block_size, skip + out.numel()))
            self._decode(packed[(start - skip) // 2 :], scales[:1], block_size, block, scratch)
            head = block.numel() - skip
            out[:head] = block[skip:]
            start, scales, out = start + head, scales[1:], out[head:]
        scales = scales[: -(-out.numel() // block_size)]
        tiles = zip(
            torch.split(packed[start // 2 : (start + out.numel() + 1) // 2], tile // 2),
            torch.split(scales, tile // block_size),
            torch.split(out, tile),
            strict=True,
        )
        for codes, factors, part in tiles if out.numel() else ():
            self._decode(codes, factors, block_size, part, scratch)

    def dequantize_rows(self, codes: Codes, start: int, stride: int, out: Tensor) -> None:
        """See `Kernel.dequantize_rows`."""
        packed, absmax, nested_absmax, offset, block_size = codes
        rows, columns = out.shape
        if columns == stride or rows == 1:
            first, last = start // block_size, -(-(start + out.numel()) // block_size)
            scales = absmax[first:last]
            if nested_absmax is not None:
                scales = torch.empty(last - first, **_NUMBERS)
                self.decode_scales(absmax, nested_absmax, offset, first, scales)
            self.dequantize(packed, scales, block_size, start, out.view(-1), False)
            return
        # Parts of blocks, all of one length, that no row's end and no block's end falls into.
        size = math.gcd(block_size, start, stride, columns)
        along = torch.arange(0, columns, size, device="cpu")
        elements = start + stride * torch.arange(rows, device="cpu")[:, None] + along
        blocks = elements // block_size
        scales = absmax[blocks]
        if nested_absmax is not None:
            entries = tables().nested_map[scales.int()]
            scales = entries.mul_(nested_absmax[blocks // _NESTED]).add_(offset)
        if size == 1:
            numbers = (
                packed[elements // 2].bitwise_right_shift_(4 - elements % 2 * 4).bitwise_and_(15)
            )
            out.copy_(tables().levels[numbers.int()].mul_(scales))
            return
        part = packed[start // 2 :].as_strided((rows, columns // 2), (stride // 2, 1))
        self.dequantize(part.reshape(-1), scales.reshape(-1), size, 0, out.view(-1), False)

    def multiply_rows(
        self, codes: Codes, start: int, dtype: torch.dtype, x: Tensor, out: Tensor
    ) -> None:
        """See `Kernel.multiply_rows`."""
        rows, columns = out.shape[1], x.shape[1]
        for first, last in row_tiles(rows, columns, _PRODUCT_TILE):
            block = x.new_empty(last - first, columns, dtype=dtype)
            begin = start + first * columns
            self.dequantize_rows(codes, begin, columns, block)
            out[:, first:last] = x @ block.float().T

    def _decode(
        self, packed: Tensor, scales: Tensor, block_size: int, out: Tensor, scratch: Tensor
    ) -> None:
        """Decode a tile that starts at a block; `scratch` is float32 and long enough."""
        count = out.numel()
        values = scratch if count == scratch.numel() else scratch[: count + count % 2]
        pairs = values.view(torch.int64)
        torch.index_select(self._levels, 0, packed[: (count + 1) // 2].int(), out=pairs)
        if count % block_size:
            factors = scales.repeat_interleave(block_size)[:count]
            out.copy_(values[:count].mul_(factors))
        elif out.dtype == torch.float32:
            blocks = values.view(-1, block_size)
            torch.mul(blocks, scales[:, None], out=out.view(-1, block_size))
        else:
            values.view(-1, block_size).mul_(scales[:, None])
            out.copy_(values)

    def error(
        self, x: Tensor, packed: Tensor, scales: Tensor, block_size: int, sums: Tensor
    ) -> None:
        """See `Kernel.error`."""
        for start in range(0, x.numel(), _ERROR_STEP):
            part = x[start : start + _ERROR_STEP]
            first, last = start // _CHUNK, -(-(start + part.numel()) // _CHUNK)
            local = scales[start // block_size :]
            squares = self._squares(part, packed[start // 2 :], local, block_size, last - first)
            # The order of nf4_body.h: 16 lanes, four rows in pairs, then in order, lanes in halves.
            rows = squares.view(2, last - first, _CHUNK // 64, 4, 16)
            groups = (rows[..., 0, :] + rows[..., 1, :]) + (rows[..., 2, :] + rows[..., 3, :])
            lanes = squares.new_zeros(2, last - first, 16)
            for group in groups.unbind(2):
                lanes += group
            sums[:, first:last] = _fold(lanes.permute(2, 0, 1), 16)

    def _squares(
        self, x: Tensor, packed: Tensor, scales: Tensor, block_size: int, chunks: int
    ) -> Tensor:
        """Square differences and values, as float64[2, whole chunks] filled up with zeros."""
        squares = torch.empty(2, chunks * _CHUNK, dtype=torch.float64, device="cpu")
        squares[:, x.numel() :] = 0
        tile = min(_tile(), x.numel())
        value = torch.empty(tile, **_NUMBERS)
        for start in range(0, x.numel(), tile):
            wide = x[start : start + tile].float()
            local = value[: wide.numel()]
            self.dequantize(packed, scales[start // block_size :], block_size, start, local, False)
            for row, numbers in zip(squares, (wide - local, wide), strict=True):
                row[start : start + wide.numel()].copy_(numbers).square_()
        return squares
