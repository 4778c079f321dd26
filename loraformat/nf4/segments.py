"""A weight in segments: matrices of a stack of experts, each quantized by itself.

Section 5 of ``spec/loraformat-1.1.md``: no byte, block or second-level block holds anything of two
segments, so that each is an ordinary `NF4` record over views of the stack's arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from loraformat.nf4 import codec
from loraformat.nf4.quantized import NF4, ceil_div
from loraformat.tensors.arrays import Array

__all__ = ["NF4Stack", "rows_of_segments", "stacked"]


@dataclass(frozen=True, eq=False)
class NF4Stack:
    """The arrays of a weight in segments; rows are segments, and maybe views of a mapped file.

    Attributes
    ----------
    packed : array
        uint8 (segments, ceil(count / 2)).
    absmax : array
        uint8 codes if double-quantized, else float32: (segments, ceil(count / block_size)).
    count : int
        Elements of each segment.
    block_size : int
    nested_absmax : array or None
        float32 (segments, ceil(blocks / 256)) if double-quantized.
    nested_offset : array or None
        float32 (segments,) if double-quantized.
    """

    packed: Array
    absmax: Array
    count: int
    block_size: int
    nested_absmax: Array | None = None
    nested_offset: Array | None = None

    def segments(self) -> list[NF4]:
        """Return each segment as a record of its own, over views of these arrays."""
        size = self.count, self.block_size
        if self.nested_absmax is None or self.nested_offset is None:
            pairs = zip(self.packed, self.absmax, strict=True)
            return [NF4(packed, absmax, *size) for packed, absmax in pairs]
        rows = zip(self.packed, self.absmax, self.nested_absmax, self.nested_offset, strict=True)
        return [NF4(row[0], row[1], *size, row[2], float(row[3])) for row in rows]


def stacked(segments: Iterable[NF4], number: int) -> NF4Stack:
    """Put segments together as they come; one alone is not copied.

    Parameters
    ----------
    segments : iterable of NF4
        Of one size and kind.
    number : int
        How many, at least one.

    Examples
    --------
    >>> experts = numpy.ones((2, 64), numpy.float32)
    >>> stack = stacked((codec.quantize(expert) for expert in experts), 2)
    >>> stack.packed.shape, stack.nested_offset.tolist()
    ((2, 32), [1.0, 1.0])
    """
    arrays: dict[str, Array] = {}
    count = block_size = 0
    for place, one in enumerate(segments):
        count, block_size = one.count, one.block_size
        own: dict[str, Any] = {"packed": one.packed, "absmax": one.absmax}
        if one.double_quant:
            offset = numpy.float32(one.nested_offset)
            own |= {"nested_absmax": one.nested_absmax, "nested_offset": offset}
        if number == 1:
            arrays = {key: value[None] for key, value in own.items()}
            break
        for key, value in own.items():
            if not place:
                arrays[key] = numpy.empty((number, *value.shape), value.dtype)
            arrays[key][place] = value
    return NF4Stack(**arrays, count=count, block_size=block_size)


def rows_of_segments(
    segments: Sequence[NF4], columns: int, dtype: numpy.dtype[Any]
) -> Callable[[int, int], Array]:
    """Return the reader of a stack's rows, which decodes none but those.

    Parameters
    ----------
    segments : sequence of NF4
        Of whole rows each.
    columns : int
    dtype : numpy.dtype
        float32, float16 or bfloat16: of the rows.

    Returns
    -------
    callable
        Of (start, stop): returns these rows of all segments, (stop - start, columns).
    """
    height = segments[0].count // max(columns, 1)

    def read(start: int, stop: int) -> Array:
        out = numpy.empty((stop - start, columns), dtype)
        for number in range(start // max(height, 1), ceil_div(stop, max(height, 1))):
            first, last = max(start, number * height), min(stop, (number + 1) * height)
            origin = number * height
            codec.dequantize(
                segments[number],
                out=out[first - start : last - start],
                start=(first - origin) * columns,
                stop=(last - origin) * columns,
            )
        return out

    return read
