"""Stored codes and scales of an element range of a quantized tensor."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from loraformat.tensors.arrays import Array

__all__ = ["Codes"]


@dataclass(frozen=True, eq=False)
class Codes:
    """Codes and scales of a whole tensor, unchecked.

    Attributes
    ----------
    packed : array
        uint8: two codes per byte.
    absmax : array
        One per block: uint8 codes, or float32 scales without `nested_absmax`.
    nested_absmax : array or None
        float32, one per 256 blocks.
    nested_offset : float
        Zero without `nested_absmax`.
    block_size : int
        Elements.
    """

    packed: Array
    absmax: Array
    nested_absmax: Array | None
    nested_offset: float
    block_size: int

    @cached_property
    def addresses(self) -> tuple[int, int, int | None]:
        """Where the three arrays are in memory: numpy takes a microsecond to tell it."""
        arrays = self.packed, self.absmax, self.nested_absmax
        packed, absmax, nested = (a if a is None else a.ctypes.data for a in arrays)
        assert packed is not None and absmax is not None
        return packed, absmax, nested
