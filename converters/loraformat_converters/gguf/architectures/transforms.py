"""Row permutations between Hugging Face and GGUF tensors.

Each transform is a small object with an inverse. It hands out rows of its result, so that a
tensor of any size is transformed tile by tile; no transform changes a value but `PlusOne`,
which rounds once to float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy

from loraformat.tensors.arrays import Array

__all__ = ["IDENTITY", "HeadOrder", "Identity", "MinusOne", "PlusOne", "Transform", "Transpose"]


@dataclass(frozen=True)
class Transform:
    """A matrix or vector made of another; by default of its shape, and its own inverse."""

    @property
    def inverse(self) -> Transform:
        """What undoes it."""
        return self

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the result."""
        return shape

    def rows(self, tensor: Array, start: int, stop: int) -> Array:
        """Return these rows of the result."""
        return tensor[start:stop]


class Identity(Transform):
    """The tensor as it is; its rows are views."""


IDENTITY = Identity()


@dataclass(frozen=True)
class HeadOrder(Transform):
    """The order of rows within each attention head, of q_proj and k_proj of the llama family.

    Hugging Face rotates dimension i of a head with dimension i + d/2, llama.cpp's llama
    rotates neighbours. So its row 2i + j of a head is row i + j·d/2 of Hugging Face's
    (``LlamaModel.permute`` of llama.cpp's converter).

    Attributes
    ----------
    heads : int
        Heads among the rows.
    interleaved : bool
        The direction: to neighbours (GGUF), or from them.

    Examples
    --------
    >>> HeadOrder(1).rows(numpy.arange(6), 0, 6).tolist()
    [0, 3, 1, 4, 2, 5]
    """

    heads: int
    interleaved: bool = True

    @property
    def inverse(self) -> HeadOrder:
        """The other direction."""
        return HeadOrder(self.heads, not self.interleaved)

    def index(self, rows: int) -> Array:
        """Return which row of the input each row of the result is, int64 (rows,)."""
        pair = (2, -1) if self.interleaved else (-1, 2)
        return numpy.arange(rows).reshape(self.heads, *pair).swapaxes(1, 2).reshape(-1)

    def rows(self, tensor: Array, start: int, stop: int) -> Array:
        """Gather rows."""
        return tensor[self.index(tensor.shape[0])[start:stop]]


class PlusOne(Transform):
    """W + 1 in float32: gemma's norms scale by 1 + w, and llama.cpp stores the sum."""

    @property
    def inverse(self) -> MinusOne:
        """W - 1."""
        return MinusOne()

    def rows(self, tensor: Array, start: int, stop: int) -> Array:
        """Add."""
        return tensor[start:stop].astype(numpy.float32) + 1


class MinusOne(Transform):
    """W - 1 in float32; see `PlusOne`."""

    @property
    def inverse(self) -> PlusOne:
        """W + 1."""
        return PlusOne()

    def rows(self, tensor: Array, start: int, stop: int) -> Array:
        """Subtract."""
        return tensor[start:stop].astype(numpy.float32) - 1


class Transpose(Transform):
    """The transpose of a matrix: ``Conv1D`` (GPT-2) stores (in, out), GGUF (out, in)."""

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape, reversed."""
        return shape[::-1]

    def rows(self, tensor: Array, start: int, stop: int) -> Array:
        """Return a view on columns, transposed."""
        return tensor[:, start:stop].T
