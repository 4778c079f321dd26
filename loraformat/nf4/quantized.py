"""The record of one NF4-quantized tensor, and checks of the arrays that kernels take."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy

from loraformat.errors import UsageError
from loraformat.nf4 import kernels
from loraformat.nf4.quant_state import BLOCK_SIZES, NESTED_BLOCK_SIZE
from loraformat.tensors.arrays import Array, numpy_dtype

__all__ = ["NF4", "ceil_div", "check_array", "check_block_size", "element_range"]

_FLOAT32 = numpy_dtype("F32")


def ceil_div(a: int, b: int) -> int:
    """Return a / b, rounded up."""
    return -(-a // b)


@dataclass(frozen=True, eq=False)
class NF4:
    """One quantized tensor; its arrays are contiguous, maybe views of a mapped file.

    Attributes
    ----------
    packed : array
        uint8[ceil(count / 2)]: two codes per byte, the first in the high nibble.
    absmax : array
        One per block: uint8 codes if double-quantized, else the float32 scales.
    count : int
        Elements.
    block_size : int
        Elements per block, one of `BLOCK_SIZES`.
    nested_absmax : array or None
        float32[ceil(blocks / 256)] if double-quantized.
    nested_offset : float or None
        A float32 number if double-quantized.

    Raises
    ------
    UsageError
        A length, dtype or layout does not fit the others.
    """

    packed: Array
    absmax: Array
    count: int
    block_size: int = 64
    nested_absmax: Array | None = None
    nested_offset: float | None = None

    def __post_init__(self) -> None:
        check_block_size(self.block_size)
        if self.count < 0 or (self.nested_absmax is None) != (self.nested_offset is None):
            raise UsageError("NF4 wants count >= 0, and nested_absmax with nested_offset")
        check_array("packed", self.packed, numpy_dtype("U8"), ceil_div(self.count, 2))
        scale = numpy_dtype("U8") if self.double_quant else _FLOAT32
        check_array("absmax", self.absmax, scale, self.blocks)
        if self.nested_absmax is not None:
            nested = ceil_div(self.blocks, NESTED_BLOCK_SIZE)
            check_array("nested_absmax", self.nested_absmax, _FLOAT32, nested)

    @cached_property
    def addresses(self) -> tuple[int, int, int | None]:
        """Where the three arrays are in memory: numpy takes a microsecond to tell it."""
        nested = None if self.nested_absmax is None else self.nested_absmax.ctypes.data
        return self.packed.ctypes.data, self.absmax.ctypes.data, nested

    @property
    def blocks(self) -> int:
        """Number of blocks, the incomplete one included."""
        return ceil_div(self.count, self.block_size)

    @property
    def double_quant(self) -> bool:
        """Whether the scales are stored as 8-bit codes."""
        return self.nested_absmax is not None

    def scales(self, start: int = 0, stop: int | None = None) -> Array:
        """Decode the scales of blocks [start, stop), float32; all blocks by default.

        They are absmax itself, or, to nearest even after each step, round(map[absmax] *
        nested_absmax[block // 256]) + nested_offset.

        Examples
        --------
        >>> from loraformat.nf4.codec import quantize
        >>> q = quantize(numpy.array([0.5, -2.0, 1.0], numpy.float32), double_quant=False)
        >>> q.scales().tolist()
        [2.0]
        """
        start, stop = element_range(start, stop, self.blocks)
        nested, offset = self.nested_absmax, self.nested_offset
        if nested is None or offset is None:
            return self.absmax[start:stop]
        out = numpy.empty(stop - start, numpy.float32)
        kernels.active().decode_scales(self.absmax, nested, offset, start, out)
        return out


def check_block_size(block_size: int) -> None:
    """Refuse a block size that NF4 does not have."""
    if block_size not in BLOCK_SIZES:
        raise UsageError(
            f"block size {block_size} is not one of {', '.join(map(str, BLOCK_SIZES))}"
        )


def check_array(what: str, array: Array, dtype: numpy.dtype[Any], count: int) -> None:
    """Refuse an array of the wrong dtype, size or layout."""
    if array.dtype != dtype or array.size != count or not array.flags.c_contiguous:
        raise UsageError(
            f"NF4 {what} is {array.dtype}{list(array.shape)}, wanted {count} elements of {dtype}, "
            "contiguous"
        )


def element_range(start: int, stop: int | None, count: int) -> tuple[int, int]:
    """Return start and stop (the count by default) if they are inside [0, count)."""
    stop = count if stop is None else stop
    if not 0 <= start <= stop <= count:
        raise UsageError(f"range [{start}, {stop}) is not inside [0, {count})")
    return start, stop
