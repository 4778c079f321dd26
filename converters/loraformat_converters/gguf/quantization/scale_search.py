"""Least-squares scales for Q4_0 to Q5_1.

ggml's plain encoder takes the scale from the largest number of a block. Two grids that do not
fit together then err the same way in every block: the sixteen levels of NF4, rounded to the
eighths of Q4_0, come out too high by 0.38 of the error's own RMS, and a constant on every weight
adds up over the layers (docs/gguf.md has figures). Here several scales are tried for each
block, each with the codes that it leads to, and the one with the smallest squared error is
taken, after it was fitted to its codes: the bytes have the same layout, any reader reads them,
and the error is smaller from every source.

Blocks lie in columns: numbers that belong together are then added by whole rows, in an order of
our own, so that every machine finds the same bits.
"""

from __future__ import annotations

import numpy

from loraformat.tensors.arrays import Array

__all__ = ["divided", "offset_codes", "signed_codes"]

_LARGEST_F16 = 65504.0


def signed_codes(blocks: Array, levels: int, stretches: tuple[float, ...]) -> tuple[Array, Array]:
    """Find d and codes q for x ≈ d (q − levels/2).

    Parameters
    ----------
    blocks : numpy.ndarray
        float32, ``[numbers, blocks]``; finite, and within float16.
    levels : int
        16 or 32; q runs from 0 to levels − 1.
    stretches : tuple of float
        To try: how many times levels/2 the largest number of a block lies from zero. With
        1, the first, the others can only make it better.

    Returns
    -------
    scales, codes : numpy.ndarray
        float16, ``[blocks]``; uint8, in the shape of ``blocks``.

    Examples
    --------
    >>> scales, codes = signed_codes(numpy.array([[-4.0], [3.5]], numpy.float32), 16, (1.0,))
    >>> scales.tolist(), codes.flatten().tolist()
    ([0.5], [0, 15])
    """
    half, count = levels // 2, len(blocks)
    low, high = blocks.min(0), blocks.max(0)
    with numpy.errstate(all="ignore"):  # of blocks that are all but zero
        extreme = numpy.where(low + high > 0, high, low)  # on whose side the grid goes further
        total, whole, work = _sum(blocks), numpy.empty_like(blocks), numpy.empty_like(blocks)
        best = numpy.full_like(low, -1)
        scale = best.copy()
        for stretch in stretches:
            _rounded(blocks, divided(-half * stretch, extreme), -half, half - 1, whole)
            codes = _sum(whole)
            squares = _sum(numpy.multiply(whole, whole, out=work)) + codes * codes / count
            product = _sum(numpy.multiply(whole, blocks, out=work)) + codes * total / count
            fitted = numpy.where(squares > 0, product / squares, 0)
            gain = product * fitted  # what the error is less than that of a scale of zero
            better = gain > best
            numpy.copyto(best, gain, where=better)
            numpy.copyto(scale, fitted, where=better)
        stored = scale.astype(numpy.float16)
        _rounded(blocks, divided(1.0, stored.astype(numpy.float32)), -half, half - 1, whole)
    return stored, numpy.add(whole, half, out=whole).astype(numpy.uint8)


def offset_codes(
    blocks: Array, levels: int, shares: tuple[float, ...]
) -> tuple[Array, Array, Array]:
    """Find d, m and codes q for x ≈ d q + m.

    Parameters
    ----------
    blocks, levels
        As `signed_codes` takes them.
    shares : tuple of float
        To try: the share of the range of a block that the grid covers at first; it is fitted
        to its codes twice. With 1, the first, the others can only make it better.

    Returns
    -------
    scales, minima, codes : numpy.ndarray
        float16, ``[blocks]``, twice; uint8, in the shape of ``blocks``.
    """
    low, high = blocks.min(0), blocks.max(0)
    with numpy.errstate(all="ignore"):  # of blocks of equal numbers
        middle = (low + high) / 2
        centred = blocks - middle  # so that sums of squares say something of the error
        spread, total = (high - low) / 2, _sum(centred)
        whole, work = numpy.empty_like(blocks), numpy.empty_like(blocks)
        best = numpy.full_like(low, -1)
        scale, minimum = best.copy(), best.copy()
        for share in shares:
            step, start = spread * (2 * share / (levels - 1)), spread * -share
            for _ in range(2):
                numpy.subtract(centred, start, out=work)
                _rounded(work, divided(1.0, step), 0, levels - 1, whole)
                step, start, gain = _fitted(centred, total, whole, work)
            better = gain > best
            for kept, found in ((best, gain), (scale, step), (minimum, start)):
                numpy.copyto(kept, found, where=better)
        stored = scale.astype(numpy.float16)
        base = (minimum + middle).clip(-_LARGEST_F16, _LARGEST_F16).astype(numpy.float16)
        numpy.subtract(blocks, base.astype(numpy.float32), out=work)
        _rounded(work, divided(1.0, stored.astype(numpy.float32)), 0, levels - 1, whole)
    return stored, base, whole.astype(numpy.uint8)


def _rounded(numbers: Array, factors: Array, least: int, most: int, out: Array) -> None:
    """Multiply columns by factors, round to whole numbers (halves to even), and clip."""
    numpy.multiply(numbers, factors, out=out)
    numpy.rint(out, out=out)
    numpy.clip(out, least, most, out=out)


def _fitted(centred: Array, total: Array, whole: Array, work: Array) -> tuple[Array, Array, Array]:
    """Return the line through the codes, and what it explains of squares."""
    count = len(centred)
    codes, squares = _sum(whole), _sum(numpy.multiply(whole, whole, out=work))
    product = _sum(numpy.multiply(whole, centred, out=work))
    variance = count * squares - codes * codes
    slope = numpy.where(variance > 0, (count * product - total * codes) / variance, 0)
    offset = (total - slope * codes) / count
    return slope, offset, slope * product + offset * total


def divided(number: float, by: Array) -> Array:
    """Return number / by, and 0 where that is beyond float32: such a block is all but zero."""
    quotient: Array = numpy.float32(number) * (numpy.float32(1) / by)
    quotient[~numpy.isfinite(quotient)] = 0
    return quotient


def _sum(numbers: Array) -> Array:
    """Add the rows, whose count is a power of two, by halves."""
    half = len(numbers) // 2
    sums = numbers[:half] + numbers[half:]
    while (half := half // 2) > 0:
        numpy.add(sums[:half], sums[half : 2 * half], out=sums[:half])
    total: Array = sums[0]
    return total
