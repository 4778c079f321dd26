"""GGUF types of metadata values and tensors.

Sizes are ggml's (``ggml.c``, ``type_traits``). A type quantizes rows in blocks: a row whose
length is no multiple of the block cannot be stored in it.
"""

from __future__ import annotations

from enum import IntEnum
from struct import calcsize

__all__ = ["GGMLType", "ValueType"]


class ValueType(IntEnum):
    """Type of a metadata value."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12

    @property
    def struct(self) -> str:
        """Format character of `struct` for one number; empty for strings and arrays."""
        return ("B", "b", "H", "h", "I", "i", "f", "?", "", "", "Q", "q", "d")[self]

    @property
    def nbytes(self) -> int:
        """Bytes of one number; 0 for strings and arrays."""
        return calcsize(f"<{self.struct}")

    @property
    def is_integer(self) -> bool:
        """Whether it holds whole numbers."""
        return self.struct in set("BbHhIiQq")


class GGMLType(IntEnum):
    """Type of a tensor: its number in the file, the numbers in a block, the bytes of a block.

    Examples
    --------
    >>> GGMLType.Q8_0.block, GGMLType.Q8_0.block_bytes
    (32, 34)
    >>> GGMLType.Q8_0.row_bytes(64)
    68
    """

    block: int
    block_bytes: int

    def __new__(cls, number: int, block: int, block_bytes: int) -> GGMLType:
        """Make a member that is its number."""
        member = int.__new__(cls, number)
        member._value_ = number
        member.block, member.block_bytes = block, block_bytes
        return member

    F32 = 0, 1, 4
    F16 = 1, 1, 2
    Q4_0 = 2, 32, 18
    Q4_1 = 3, 32, 20
    Q5_0 = 6, 32, 22
    Q5_1 = 7, 32, 24
    Q8_0 = 8, 32, 34
    Q8_1 = 9, 32, 40
    Q2_K = 10, 256, 84
    Q3_K = 11, 256, 110
    Q4_K = 12, 256, 144
    Q5_K = 13, 256, 176
    Q6_K = 14, 256, 210
    Q8_K = 15, 256, 292
    IQ2_XXS = 16, 256, 66
    IQ2_XS = 17, 256, 74
    IQ3_XXS = 18, 256, 98
    IQ1_S = 19, 256, 50
    IQ4_NL = 20, 32, 18
    IQ3_S = 21, 256, 110
    IQ2_S = 22, 256, 82
    IQ4_XS = 23, 256, 136
    I8 = 24, 1, 1
    I16 = 25, 1, 2
    I32 = 26, 1, 4
    I64 = 27, 1, 8
    F64 = 28, 1, 8
    IQ1_M = 29, 256, 56
    BF16 = 30, 1, 2
    TQ1_0 = 34, 256, 54
    TQ2_0 = 35, 256, 66
    MXFP4 = 39, 32, 17
    NVFP4 = 40, 64, 36
    Q1_0 = 41, 128, 18

    def row_bytes(self, length: int) -> int:
        """Return the bytes of a row of ``length`` numbers, a multiple of the block."""
        return length // self.block * self.block_bytes
