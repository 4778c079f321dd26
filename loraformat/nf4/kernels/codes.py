"""Stored codes and scales of an element range of a quantized tensor."""

from __future__ import annotations

from typing import NamedTuple

from loraformat.tensors.arrays import Array

__all__ = ["Codes"]


class Codes(NamedTuple):
    """A whole tensor; nothing of it is checked here.

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
