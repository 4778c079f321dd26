"""Runs of elements of weights in NF4 as weights of their own, by copying codes.

Blocks of 64 elements, and second-level blocks of 256 blocks, count from a weight's first element.
What begins and ends between them keeps its codes, bit for bit; what ends inside a block does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy

from loraformat.nf4.quant_state import NESTED_BLOCK_SIZE
from loraformat.nf4.quantized import NF4, ceil_div

__all__ = ["kept", "run_of"]


def kept(count: int, block_size: int, start: int, stop: int) -> Literal["all", "codes"] | None:
    """Tell what a run of elements keeps of weights of `count` elements that follow each other.

    Returns
    -------
    "all", "codes" or None
        Its codes and scales; its codes, with scales decoded to float32, because they would share
        a second-level block with others, or have offsets of several weights; nothing, because it
        begins or ends inside a block.

    Examples
    --------
    >>> kept(32768, 64, 16384, 32768), kept(32768, 64, 64, 128), kept(32768, 64, 0, 96)
    ('all', 'codes', None)
    >>> kept(128, 64, 0, 256), kept(96, 64, 0, 192), kept(96, 64, 96, 192)
    ('codes', None, 'all')
    """
    first, last = start // count, ceil_div(stop, count)
    if last - first > 1:  # of several weights, whole blocks of each
        ends = (start % count, stop % count, count)
        return None if any(end % block_size for end in ends) else "codes"
    begin, end = start - first * count, stop - first * count

    def between(size: int) -> bool:
        return begin % size == 0 and (end % size == 0 or end == count)

    if between(block_size * NESTED_BLOCK_SIZE):
        return "all"
    return "codes" if between(block_size) else None


def run_of(weights: Sequence[NF4], start: int, stop: int) -> NF4:
    """Return elements [start, stop) of weights that follow each other, which `kept` allows.

    Parameters
    ----------
    weights : sequence of NF4
        Of one size and kind.
    start, stop : int
        Not an empty range.

    Returns
    -------
    NF4
        Over views of the arrays where these are one run. It decodes to the same bits.
    """
    count, block = weights[0].count, weights[0].block_size
    how = kept(count, block, start, stop)
    assert how is not None, (count, block, start, stop)
    if how == "all":
        one, begin = weights[start // count], start // count * count
        return _cut(one, start - begin, stop - begin)
    packed, scales = [], []
    for number in range(start // count, ceil_div(stop, count)):
        begin, end = max(start - number * count, 0), min(stop - number * count, count)
        packed.append(weights[number].packed[begin // 2 : ceil_div(end, 2)])
        scales.append(weights[number].scales(begin // block, ceil_div(end, block)))
    return NF4(numpy.concatenate(packed), numpy.concatenate(scales), stop - start, block)


def _cut(weight: NF4, start: int, stop: int) -> NF4:
    first, last = start // weight.block_size, ceil_div(stop, weight.block_size)
    packed, absmax = weight.packed[start // 2 : ceil_div(stop, 2)], weight.absmax[first:last]
    nested = weight.nested_absmax
    if nested is not None:
        nested = nested[first // NESTED_BLOCK_SIZE : ceil_div(last, NESTED_BLOCK_SIZE)]
    size = stop - start, weight.block_size
    return NF4(packed, absmax, *size, nested, weight.nested_offset)
