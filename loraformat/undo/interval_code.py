"""The interval code, which encodes what rounding loses in a merge.

A merge is a monotone function of each weight, f(w) = round(g · (w + d)), see
`loraformat.undo.fixed_point`. Number the finite values of w's dtype by order (both zeros are
number 0). Given the merged value M, the delta d and the gain g, the numbers with
f(w) = M are an interval [a, b]. If it holds one number, nothing need be stored; else the
rank w − a, in ⌈log₂(b − a + 1)⌉ bits. For a delta of 1 % of a bfloat16 weight's norm that
is 0.03 bits per weight, and no code needs fewer: it is just what was lost.

Negative gains are turned: f(w) = M is round(−g · (w + d)) = −M. Negative zeros are listed by
position. What is not finite has no interval.

`loraformat.nf4.kernels.interval_native` does it in C; here it stands in numpy, with the same bits.
The interval is found by bisection on the numbers, evaluating f itself, so no property of
rounding is assumed but that it is monotone. ``spec/undo-1.0.md``, section 3, has the rules.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy

from loraformat.nf4.kernels import interval_native as native
from loraformat.nf4.kernels.merge_tile import merged_values
from loraformat.tensors.arrays import Array, finite

__all__ = ["Unmergeable", "decode_tile", "encode_tile"]


class Unmergeable(Exception):
    """Raised for a tile that no interval describes; its tensor is stored in full."""


def _numbers(values: Array) -> Array:
    """Return the ordinal of each value in its dtype as int32; both zeros are 0."""
    stored = numpy.ascontiguousarray(values).view(f"i{values.itemsize}")
    bits = stored.astype(numpy.int32)
    return numpy.where(bits >= 0, bits, numpy.iinfo(stored.dtype).min - bits)


def _values(numbers: Array, dtype: numpy.dtype[Any]) -> Array:
    """Return the values of these ordinals."""
    stored = numpy.dtype(f"i{dtype.itemsize}")
    bits = numpy.where(numbers >= 0, numbers, numpy.iinfo(stored).min - numbers)
    return bits.astype(stored).view(dtype)


def _top(dtype: numpy.dtype[Any]) -> int:
    """Return the ordinal of the largest finite value."""
    return int(_numbers(numpy.full(1, numpy.inf, dtype))[0]) - 1


@dataclass(frozen=True, slots=True)
class _Tile:
    """Flat operands of one tile, turned so that every gain is positive or zero."""

    delta: Array
    gain: Array | None
    merged: Array
    numbers: Array
    dtype: numpy.dtype[Any]

    def at(self, index: Array) -> _Tile:
        """Return the selected elements."""
        gain = None if self.gain is None else self.gain[index]
        return _Tile(self.delta[index], gain, self.merged[index], self.numbers[index], self.dtype)

    def forward(self, numbers: Array) -> Array:
        """Return the ordinal of f(w) for the ordinal of w."""
        weight = _values(numbers, self.dtype)
        found = merged_values(weight, self.delta, self.gain, self.merged.dtype)
        if self.gain is not None:
            found[numpy.isnan(found)] = 0  # infinity times gain 0
        return _numbers(found)


def _tile(merged: Array, delta: Array, gain: Array | None, dtype: numpy.dtype[Any]) -> _Tile:
    flat = merged.reshape(-1)
    if not (finite(flat) and finite(delta) and (gain is None or finite(gain))):
        raise Unmergeable
    each = numpy.broadcast_to(delta, merged.shape).reshape(-1)
    if gain is None:
        return _Tile(each, None, flat, _numbers(flat), dtype)
    gains = numpy.broadcast_to(gain, merged.shape).reshape(-1)
    flat = numpy.where(gains < 0, -flat, flat)
    return _Tile(each, numpy.abs(gains), flat, _numbers(flat), dtype)


def _guess(tile: _Tile) -> Array:
    """Return the ordinal of a value near those that merge into M."""
    near = tile.merged.astype(numpy.float32)
    limit = float(_values(numpy.full(1, _top(tile.dtype), numpy.int32), tile.dtype)[0])
    with numpy.errstate(all="ignore"):
        if tile.gain is not None:
            near /= tile.gain
        near -= tile.delta
    near[numpy.isnan(near)] = 0
    return _numbers(near.clip(-limit, limit).astype(tile.dtype))


def _intervals(tile: _Tile) -> tuple[Array, Array, Array, Array]:
    """Return one ordinal per element; for wider intervals also index, a and count.

    Most intervals hold one number, the guess, whose neighbours merge into something else; only
    the others are bisected.
    """
    top = _top(tile.dtype)
    guess = _guess(tile)
    below = tile.forward(numpy.maximum(guess - 1, -top)) < tile.numbers
    above = tile.forward(numpy.minimum(guess + 1, top)) > tile.numbers
    alone = below & above & (tile.forward(guess) == tile.numbers)
    index = numpy.flatnonzero(~alone)
    some = tile.at(index)
    first = _bisect(some, top, strict=False)
    last = _bisect(some, top, strict=True) - 1
    if (last < first).any():
        raise Unmergeable
    guess[index] = first
    first = first.astype(numpy.int64)
    return guess, index, first, last - first + 1


def _bisect(tile: _Tile, top: int, *, strict: bool) -> Array:
    """Return the least number with f ≥ M, or f > M if strict; top + 1 if there is none."""
    low = numpy.full_like(tile.numbers, -top)
    high = numpy.full_like(tile.numbers, top + 1)
    for _ in range((2 * top + 1).bit_length()):
        middle = (low >> 1) + (high >> 1) + (low & high & 1)  # without overflow
        found = tile.forward(numpy.minimum(middle, top))
        right = found > tile.numbers if strict else found >= tile.numbers
        right |= middle > top
        high = numpy.where(right, middle, high)
        low = numpy.where(right, low, numpy.minimum(middle + 1, top + 1))
        low = numpy.minimum(low, high)
    return high


def _widths(counts: Array) -> Array:
    """Return ⌈log₂ count⌉ of each count."""
    return numpy.frexp((counts - 1).astype(numpy.float64))[1].astype(numpy.int64)


def encode_tile(
    weight: Array, delta: Array, gain: Array | None, merged: Array
) -> tuple[bytes, Array]:
    """Return what is lost of a tile.

    Parameters
    ----------
    weight : array
        The original.
    delta, gain
        As in `loraformat.nf4.kernels.merge_tile.merged_values`; of one or two dimensions.
    merged : array
        Its result.

    Returns
    -------
    bits : bytes
        The ranks, each in as many bits as its interval needs, lowest bit first; whole bytes.
    zeros : array
        int64 positions of negative zeros in the flat tile.

    Raises
    ------
    Unmergeable
        If the tile cannot be restored from these.

    Examples
    --------
    >>> from loraformat.tensors.arrays import numpy_dtype
    >>> weight = numpy.array([1.0, 1.0078125], numpy_dtype("BF16"))
    >>> delta = numpy.full(2, 300.0, numpy.float32)
    >>> merged = merged_values(weight, delta, None, weight.dtype)
    >>> bits, zeros = encode_tile(weight, delta, None, merged)
    >>> decode_tile(merged, delta, None, weight.dtype, bits).tolist()
    [1.0, 1.0078125]
    """
    if native.loaded():
        found = native.encode(
            numpy.ascontiguousarray(weight), delta, gain, numpy.ascontiguousarray(merged)
        )
        if found is None:
            raise Unmergeable
        return found
    flat = weight.reshape(-1)
    if not finite(flat):
        raise Unmergeable
    tile = _tile(merged, delta, gain, weight.dtype)
    exact, index, first, counts = _intervals(tile)
    numbers = _numbers(flat)
    ranks = numbers[index] - first
    exact[index] = numbers[index]
    if ((ranks < 0) | (ranks >= counts)).any() or not numpy.array_equal(exact, numbers):
        raise Unmergeable
    zeros = numpy.flatnonzero((flat == 0) & numpy.signbit(flat))
    return _pack(ranks, _widths(counts)), zeros


def decode_tile(
    merged: Array,
    delta: Array,
    gain: Array | None,
    dtype: numpy.dtype[Any],
    bits: bytes | memoryview,
    out: Array | None = None,
) -> Array:
    """Return the original tile, of a dtype, without the signs of zeros.

    `out`, if given, is contiguous and of that dtype. Raises `Unmergeable` if the bits do not belong
    to the tile, which is given as in `encode_tile`.
    """
    out = numpy.empty(merged.shape, dtype) if out is None else out
    if native.loaded():
        if not native.decode(numpy.ascontiguousarray(merged), delta, gain, bits, out):
            raise Unmergeable
        return out
    tile = _tile(merged, delta, gain, dtype)
    numbers, index, first, counts = _intervals(tile)
    widths = _widths(counts)
    needed = (int(widths.sum()) + 7) // 8
    if needed != len(bits) or (needed and bits[-1] >> (int(widths.sum()) - 1) % 8 >> 1):
        raise Unmergeable  # a byte too many or too few, or a bit set that belongs to no rank
    ranks = _unpack(bits, widths)
    if (ranks >= counts).any():
        raise Unmergeable
    numbers[index] = first + ranks
    out[...] = _values(numbers, dtype).reshape(merged.shape)
    return out


def _places(widths: Array) -> tuple[Array, Array]:
    """Return for every bit its field and its position in the field."""
    owner = numpy.repeat(numpy.arange(len(widths)), widths)
    begins = numpy.cumsum(widths) - widths
    return owner, numpy.arange(len(owner)) - begins[owner]


def _pack(values: Array, widths: Array) -> bytes:
    owner, place = _places(widths)
    return numpy.packbits((values[owner] >> place) & 1, bitorder="little").tobytes()


def _unpack(bits: bytes | memoryview, widths: Array) -> Array:
    owner, place = _places(widths)
    flat = numpy.unpackbits(numpy.frombuffer(bits, numpy.uint8), bitorder="little")
    values = numpy.zeros(len(widths), numpy.int64)
    numpy.add.at(values, owner, flat[: len(owner)].astype(numpy.int64) << place)
    return values
