"""The kernels in plain torch: the fallback without a compiler, and the oracle of the tests.

Everything runs in tiles small enough for the cache and for torch not to start OpenMP threads
(its operations stay serial up to 32,768 elements); `loraformat.kernels.threads` parallelizes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loraformat.kernels.tables import tables

__all__ = ["ReferenceKernel"]

_TILE = 1 << 15
_TINY = 1e-38
_NESTED = 256
_CHUNK = 4096


def _pair_tables() -> tuple[Tensor, Tensor]:
    """Both thresholds and the packed codes below them, by the bins of two neighbours.

    The index is ``bin of the first + 256 * bin of the second``: two int8 read as one int16. One
    8-byte look-up then does the work of two 4-byte ones.
    """
    t = tables()
    thresholds = torch.zeros(32, 256, 2)
    thresholds[:, :32, 0] = t.bin_threshold
    thresholds[:, :32, 1] = t.bin_threshold[:, None]
    codes = torch.zeros(32, 256, dtype=torch.int32)
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
    """The `loraformat.kernels.Kernel` methods in torch."""

    name = "torch"

    def __init__(self) -> None:
        pairs = torch.cartesian_prod(tables().levels, tables().levels)
        # Both levels of a byte as one 8-byte item, so that one look-up fetches two.
        self._levels = pairs.contiguous().view(torch.int64).flatten()
        self._thresholds, self._codes = _pair_tables()
        self._bins = torch.tensor(15.5)

    def quantize(self, x: Tensor, block_size: int, packed: Tensor, absmax: Tensor) -> bool:
        """See `Kernel.quantize`."""
        whole = x.numel() - x.numel() % block_size
        tiles = zip(
            torch.split(x[:whole], _TILE),
            torch.split(packed[: whole // 2], _TILE // 2),
            torch.split(absmax[: whole // block_size], _TILE // block_size),
            strict=False,  # without whole blocks the first has one empty tile
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
        self._encode(torch.cat([x / absmax, torch.zeros(x.numel() % 2)]), packed)
        return True

    def sum_scales(self, absmax: Tensor, sums: Tensor) -> None:
        """See `Kernel.sum_scales`."""
        padded = torch.zeros(sums.numel() * _NESTED, dtype=torch.float64)
        padded[: absmax.numel()] = absmax
        sums.copy_(_fold(padded.view(-1, _NESTED).T, _NESTED))

    def quantize_scales(
        self, absmax: Tensor, offset: float, codes: Tensor, nested_absmax: Tensor
    ) -> None:
        """See `Kernel.quantize_scales`."""
        whole = absmax.numel() - absmax.numel() % _NESTED
        for start in range(0, whole, _TILE):
            stop = min(start + _TILE, whole)
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
        for first in range(start, start + out.numel(), _TILE):
            last = min(first + _TILE, start + out.numel())
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
        skip = start % block_size
        scratch = torch.empty(min(out.numel() + skip + 1, _TILE))
        if skip:  # the rest of a block, by way of the whole of it
            block = torch.empty(min(block_size, skip + out.numel()), dtype=out.dtype)
            self._decode(packed[(start - skip) // 2 :], scales[:1], block_size, block, scratch)
            head = block.numel() - skip
            out[:head] = block[skip:]
            start, scales, out = start + head, scales[1:], out[head:]
        tiles = zip(
            torch.split(packed[start // 2 : (start + out.numel() + 1) // 2], _TILE // 2),
            torch.split(scales, _TILE // block_size),
            torch.split(out, _TILE),
            strict=False,  # scales may go on beyond the range
        )
        for codes, factors, part in tiles if out.numel() else ():
            self._decode(codes, factors, block_size, part, scratch)

    def _decode(
        self, packed: Tensor, scales: Tensor, block_size: int, out: Tensor, scratch: Tensor
    ) -> None:
        """Decode a tile that starts at a block; `scratch` is float32 and long enough."""
        count = out.numel()
        pairs = scratch[: count + count % 2].view(torch.int64)
        torch.index_select(self._levels, 0, packed[: (count + 1) // 2].int(), out=pairs)
        whole = count - count % block_size
        if whole:
            blocks = scratch[:whole].view(-1, block_size)
            factors = scales[: whole // block_size, None]
            if out.dtype == torch.float32:
                torch.mul(blocks, factors, out=out[:whole].view(-1, block_size))
            else:
                out[:whole].view(-1, block_size).copy_(blocks.mul_(factors))
        if whole < count:
            out[whole:] = scratch[whole:count] * scales[whole // block_size]

    def error(
        self, x: Tensor, packed: Tensor, scales: Tensor, block_size: int, sums: Tensor
    ) -> None:
        """See `Kernel.error`."""
        chunks = sums.shape[1]
        squares = torch.zeros(2, chunks * _CHUNK, dtype=torch.float64)
        for start in range(0, x.numel(), _TILE):
            stop = min(start + _TILE, x.numel())
            wide, value = x[start:stop].float(), torch.empty(stop - start)
            self.dequantize(packed, scales[start // block_size :], block_size, start, value, False)
            squares[0, start:stop] = (wide - value).double().square_()
            squares[1, start:stop] = wide.double().square_()
        # 16 lanes, each summed in order, then folded: the order of nf4_body.h.
        rows = squares.view(2, chunks, _CHUNK // 16, 16)
        lanes = torch.zeros(2, chunks, 16, dtype=torch.float64)
        for row in range(_CHUNK // 16):
            lanes += rows[:, :, row]
        sums.copy_(_fold(lanes.permute(2, 0, 1), 16))
