"""The interval code, which encodes what rounding loses in a merge.

A merge is a monotone function of each weight, f(w) = round(g · (w + d)), see
`loraformat.undo.fixed_point`. Number the finite values of w's dtype by order (both zeros are
number 0). Given the merged value M, the delta d and the gain g, the numbers with
f(w) = M are an interval [a, b]. If it holds one number, nothing need be stored; else the
rank w − a, in ⌈log₂(b − a + 1)⌉ bits. For a delta of 1 % of a bfloat16 weight's norm that
is 0.03 bits per weight, and no code needs fewer: it is just what was lost.

Negative gains are turned: f(w) = M is round(−g · (w + d)) = −M. Negative zeros are listed by
position. What is not finite has no interval.

`loraformat.nf4.kernels.interval_native` does it in C; here it stands in torch, with the same bits.
The interval is found by bisection on the numbers, evaluating f itself, so no property of
rounding is assumed but that it is monotone. ``spec/undo-1.0.md``, section 3, has the rules.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy
import torch

from loraformat.nf4.kernels import interval_native as native
from loraformat.undo.fixed_point import merge_values

__all__ = ["Unmergeable", "decode_tile", "encode_tile"]

_INTEGERS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}
#: Number of infinity: all finite values have smaller ones.
_INFINITY = {torch.float32: 0x7F800000, torch.float16: 0x7C00, torch.bfloat16: 0x7F80}


class Unmergeable(Exception):
    """A tile that no interval describes; its tensor is stored as it is."""


def _numbers(values: torch.Tensor) -> torch.Tensor:
    """Return the place of each value in the order of its dtype, as int32; zeros are 0."""
    bits = values.contiguous().view(_INTEGERS[values.dtype]).int()
    low = torch.iinfo(_INTEGERS[values.dtype]).min
    return torch.where(bits >= 0, bits, low - bits)


def _values(numbers: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the values at these places."""
    low = torch.iinfo(_INTEGERS[dtype]).min
    bits = torch.where(numbers >= 0, numbers, low - numbers)
    return bits.to(_INTEGERS[dtype]).view(dtype)


@dataclass(frozen=True, slots=True)
class _Tile:
    """Flat operands of one tile, turned so that every gain is positive or zero."""

    delta: torch.Tensor
    gain: torch.Tensor | None
    merged: torch.Tensor
    numbers: torch.Tensor
    dtype: torch.dtype

    def at(self, index: torch.Tensor) -> _Tile:
        """Return some elements."""
        gain = None if self.gain is None else self.gain[index]
        return _Tile(self.delta[index], gain, self.merged[index], self.numbers[index], self.dtype)

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        """Return the number of f(w), for the number of w."""
        weight = _values(numbers, self.dtype)
        found = merge_values(weight, self.delta, self.gain, self.merged.dtype)
        if self.gain is not None:
            found = torch.where(found.isnan(), 0, found)  # infinity times gain 0
        return _numbers(found)


def _tile(
    merged: torch.Tensor, delta: torch.Tensor, gain: torch.Tensor | None, dtype: torch.dtype
) -> _Tile:
    flat = merged.reshape(-1)
    for operand in (flat, delta) if gain is None else (flat, delta, gain):
        if not bool(torch.isfinite(operand).all()):
            raise Unmergeable
    each = delta.expand_as(merged).reshape(-1)
    if gain is None:
        return _Tile(each, None, flat, _numbers(flat), dtype)
    gains = gain.expand_as(merged).reshape(-1)
    flat = torch.where(gains < 0, -flat, flat)
    return _Tile(each, gains.abs(), flat, _numbers(flat), dtype)


def _guess(tile: _Tile) -> torch.Tensor:
    """Return the number of a value near those that merge into M."""
    near = tile.merged.float()
    if tile.gain is not None:
        near = near / tile.gain
    limit = torch.finfo(tile.dtype).max
    near = (near - tile.delta).nan_to_num(0.0, limit, -limit).clamp(-limit, limit)
    return _numbers(near.to(tile.dtype))


def _intervals(tile: _Tile) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return one number for every element, and where the interval holds more: index, a, count.

    Most intervals hold one number, the guess, whose neighbours merge into something else; only
    the others are bisected.
    """
    top = _INFINITY[tile.dtype] - 1
    guess = _guess(tile)
    below = tile.forward((guess - 1).clamp(min=-top)) < tile.numbers
    above = tile.forward((guess + 1).clamp(max=top)) > tile.numbers
    alone = below & above & (tile.forward(guess) == tile.numbers)
    index = torch.nonzero(~alone).view(-1)
    some = tile.at(index)
    first = _bisect(some, top, strict=False)
    last = _bisect(some, top, strict=True) - 1
    if bool((last < first).any()):
        raise Unmergeable
    guess[index] = first
    return guess, index, first.long(), last.long() - first.long() + 1


def _bisect(tile: _Tile, top: int, *, strict: bool) -> torch.Tensor:
    """Return the least number with f ≥ M, or f > M if strict; top + 1 if there is none."""
    low = torch.full_like(tile.numbers, -top)
    high = torch.full_like(tile.numbers, top + 1)
    for _ in range((2 * top + 1).bit_length()):
        middle = (low >> 1) + (high >> 1) + (low & high & 1)  # without overflow
        found = tile.forward(middle.clamp(max=top))
        right = found > tile.numbers if strict else found >= tile.numbers
        right |= middle > top
        high = torch.where(right, middle, high)
        low = torch.where(right, low, (middle + 1).clamp(max=top + 1))
        low = torch.minimum(low, high)
    return high


def _widths(counts: torch.Tensor) -> numpy.ndarray[Any, Any]:
    """Return ⌈log₂ count⌉ of each count."""
    exponents = torch.frexp((counts - 1).double()).exponent
    return exponents.long().numpy()


def encode_tile(
    weight: torch.Tensor, delta: torch.Tensor, gain: torch.Tensor | None, merged: torch.Tensor
) -> tuple[bytes, torch.Tensor]:
    """Return what is lost of a tile.

    Parameters
    ----------
    weight : torch.Tensor
        The original.
    delta, gain
        As in `loraformat.undo.fixed_point.merge_values`; of one or two dimensions.
    merged : torch.Tensor
        Its result.

    Returns
    -------
    bits : bytes
        The ranks, each in as many bits as its interval needs, lowest bit first; whole bytes.
    zeros : torch.Tensor
        int64 positions of negative zeros in the flat tile.

    Raises
    ------
    Unmergeable
        If the tile cannot be restored from these.

    Examples
    --------
    >>> weight = torch.tensor([1.0, 1.0078125], dtype=torch.bfloat16)
    >>> delta = torch.full((2,), 300.0)
    >>> merged = merge_values(weight, delta, None, torch.bfloat16)
    >>> bits, zeros = encode_tile(weight, delta, None, merged)
    >>> torch.equal(decode_tile(merged, delta, None, torch.bfloat16, bits), weight)
    True
    """
    if native.loaded():
        found = native.encode(weight.contiguous(), delta, gain, merged.contiguous())
        if found is None:
            raise Unmergeable
        return found
    flat = weight.reshape(-1)
    if not bool(torch.isfinite(flat).all()):
        raise Unmergeable
    tile = _tile(merged, delta, gain, weight.dtype)
    exact, index, first, counts = _intervals(tile)
    numbers = _numbers(flat)
    ranks = numbers[index] - first
    exact[index] = numbers[index]
    if bool((ranks < 0).any() | (ranks >= counts).any()) or not torch.equal(exact, numbers):
        raise Unmergeable
    zeros = torch.nonzero((flat == 0) & torch.signbit(flat)).view(-1)
    return _pack(ranks.numpy(), _widths(counts)), zeros


def decode_tile(
    merged: torch.Tensor,
    delta: torch.Tensor,
    gain: torch.Tensor | None,
    dtype: torch.dtype,
    bits: bytes | memoryview,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the original tile, without the signs of zeros.

    Parameters
    ----------
    merged, delta, gain
        As in `encode_tile`.
    dtype : torch.dtype
        Of the original.
    bits : bytes
        The tile's.
    out : torch.Tensor, optional
        Where to put it: contiguous, of that dtype.

    Raises
    ------
    Unmergeable
        If the bits do not belong to it.
    """
    out = torch.empty(merged.shape, dtype=dtype) if out is None else out
    if native.loaded():
        if not native.decode(merged.contiguous(), delta, gain, bits, out):
            raise Unmergeable
        return out
    tile = _tile(merged, delta, gain, dtype)
    numbers, index, first, counts = _intervals(tile)
    widths = _widths(counts)
    needed = (int(widths.sum()) + 7) // 8
    if needed != len(bits) or (needed and bits[-1] >> (int(widths.sum()) - 1) % 8 >> 1):
        raise Unmergeable  # a byte too many or too few, or a bit set that belongs to no rank
    ranks = torch.from_numpy(_unpack(bits, widths))
    if bool((ranks >= counts).any()):
        raise Unmergeable
    numbers[index] = (first + ranks).int()
    return out.copy_(_values(numbers, dtype).view(merged.shape))


def _places(widths: numpy.ndarray[Any, Any]) -> tuple[Any, Any]:
    """Return of every bit the field it belongs to, and its place in it."""
    owner = numpy.repeat(numpy.arange(len(widths)), widths)
    begins = numpy.cumsum(widths) - widths
    return owner, numpy.arange(len(owner)) - begins[owner]


def _pack(values: numpy.ndarray[Any, Any], widths: numpy.ndarray[Any, Any]) -> bytes:
    owner, place = _places(widths)
    return numpy.packbits((values[owner] >> place) & 1, bitorder="little").tobytes()


def _unpack(bits: bytes | memoryview, widths: numpy.ndarray[Any, Any]) -> numpy.ndarray[Any, Any]:
    owner, place = _places(widths)
    flat = numpy.unpackbits(numpy.frombuffer(bits, numpy.uint8), bitorder="little")
    values = numpy.zeros(len(widths), numpy.int64)
    numpy.add.at(values, owner, flat[: len(owner)].astype(numpy.int64) << place)
    return values
