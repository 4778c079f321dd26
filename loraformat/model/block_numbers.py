"""Scales and zero points of a quantized weight, by rows: W = scale * (code - zero).

Each belongs to the whole tensor, an output feature, or a block.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy

from loraformat.errors import InputError, printable
from loraformat.model.checkpoint import DenseTensor
from loraformat.model.quantization_method import DAMAGED
from loraformat.model.rows import RowReader
from loraformat.tensors.arrays import Array, array_view

__all__ = ["SCALE_TYPES", "BlockNumbers", "by_column", "default_dtype", "scaled"]

_MX_BLOCK = (1, 32)
#: Types of scales: numbers, and exponents of two.
SCALE_TYPES, _EXPONENTS = ("F32", "BF16", "F16"), ("F8_E8M0", "U8")


@dataclass(frozen=True, slots=True)
class BlockNumbers:
    """Numbers that each belong to a block of a weight's elements.

    Attributes
    ----------
    tensor : DenseTensor
    dtype : str
        What its bytes are.
    own, weight : tuple of int
        Its shape with as many dimensions as the weight's, and the weight's.
    repeats : tuple of int
        How many elements share a number, along each dimension.
    """

    tensor: DenseTensor
    dtype: str
    own: tuple[int, ...]
    weight: tuple[int, ...]
    repeats: tuple[int, ...]

    @classmethod
    def of(
        cls, tensor: DenseTensor, weight: tuple[int, ...], blocks: Iterable[tuple[int, int]]
    ) -> BlockNumbers | None:
        """Return the numbers of a weight in blocks of one of some sizes; None if none fits."""
        few = (1,) * (2 - len(weight))  # a vector is a matrix of one row
        shape, own = few + weight, few + _aligned(tensor.shape, weight)
        if len(own) != len(shape):
            return None
        for block in blocks:
            sizes = (1,) * (len(shape) - 2) + block
            found = list(zip(own, shape, sizes, strict=True))
            if all(n in (1, count, -(-count // size)) for n, count, size in found):
                repeats = tuple(1 if n in (1, count) else size for n, count, size in found)
                return cls(tensor, tensor.dtype, own, shape, repeats)
        return None

    @classmethod
    def scales(
        cls, tensor: DenseTensor, weight: tuple[int, ...], block: tuple[int, int], path: Path
    ) -> BlockNumbers:
        """Return the scales of a weight, in blocks of one size or, of exponents, also MX's.

        Raises
        ------
        InputError
            If the tensor has another shape than such scales, or a type that no scales have.
        """
        exponents = tensor.dtype in _EXPONENTS
        if tensor.dtype in SCALE_TYPES + _EXPONENTS:
            found = cls.of(tensor, weight, (block, _MX_BLOCK) if exponents else (block,))
            if found is not None:
                return replace(found, dtype="F8_E8M0") if exponents else found
        raise InputError(
            f"tensor {printable(tensor.name)} is {tensor.dtype} {list(tensor.shape)}, which scales "
            f"no weight of shape {list(weight)} in blocks of {block[0]} x {block[1]}",
            path=path,
            hint=DAMAGED,
        )

    def rows(self, start: int, stop: int) -> Array:
        """Return the numbers of rows in float32: one for each of them, or for each element."""
        numbers = array_view(self.tensor.load(), self.dtype, self.own)
        # Where the numbers of each row are; along a dimension of size 1 all rows share them.
        places = numpy.unravel_index(numpy.arange(start, stop), self.weight[:-1])
        sizes = zip(places, self.repeats[:-1], self.own[:-1], strict=True)
        at = tuple(place // repeat * (size > 1) for place, repeat, size in sizes)
        found = numbers[at].astype(numpy.float32)
        if self.own[-1] > 1:
            found = found.repeat(self.repeats[-1], axis=1)[:, : self.weight[-1]]
        return found


def _aligned(own: tuple[int, ...], weight: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of numbers with as many dimensions as the weight's."""
    if own in ((), (1,)):
        return (1,) * len(weight)
    if len(own) == 1 and len(weight) == 2:  # one for each output feature
        return (*own, 1)
    return own


def scaled(codes: RowReader, scales: RowReader, zeros: RowReader | None = None) -> RowReader:
    """Return the reader of scale * (code - zero), float32, of readers of these.

    Scales and zeros are, for each row: one, one for each column, or one for each group of equally
    many columns.
    """

    def rows(start: int, stop: int) -> Array:
        found = numpy.ascontiguousarray(codes(start, stop))
        if zeros is not None:
            _apply(numpy.subtract, found, zeros(start, stop))
        _apply(numpy.multiply, found, scales(start, stop))
        return found

    return rows


def _apply(operation: numpy.ufunc, values: Array, numbers: Array) -> None:
    """Compute with the numbers of groups in place, without writing one for each column first."""
    groups = numbers.shape[-1]
    if groups not in (1, values.shape[-1]):
        values = values.reshape(len(values), groups, values.shape[-1] // groups)
        numbers = numbers[..., None]
    operation(values, numbers, out=values)


def by_column(numbers: Array, columns: int, groups: Array, name: str, path: Path) -> Array:
    """Return the numbers of columns from those of the groups that they are in.

    Parameters
    ----------
    numbers : array
        (rows, groups).
    columns : int
    groups : array
        Of each column. If they stand in a row, the numbers are returned as they are: `scaled`
        takes them.
    name, path
        Of the tensor of groups, for the error.

    Raises
    ------
    InputError
        If one of the groups is none.
    """
    count = numbers.shape[-1]
    if columns % count == 0 and numpy.array_equal(
        groups, numpy.arange(columns) // (columns // count)
    ):
        return numbers
    if not 0 <= groups.min(initial=0) <= groups.max(initial=0) < count:
        raise InputError(
            f"tensor {printable(name)} names groups beyond the {count} that have scales",
            path=path,
            hint=DAMAGED,
        )
    return numbers.take(groups, axis=-1)


def default_dtype(scale: DenseTensor) -> str:
    """Return what a weight is rounded to: the type of its scales, if it has 16 bits, or BF16."""
    return scale.dtype if scale.dtype == "F16" else "BF16"
