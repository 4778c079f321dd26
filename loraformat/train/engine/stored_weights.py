"""The weights of an open model as matrices, tables and copies, and the bytes that they lie in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from loraformat.bundle.reader import Bundle
from loraformat.errors import UnsupportedError, printable
from loraformat.model.base_names.sources import Sources
from loraformat.model.base_names.sources import find_sources as find_any_sources
from loraformat.model.checkpoint import NF4_PARTS, DenseTensor, NF4Tensor
from loraformat.shards.layout import TAIL_SUFFIXES
from loraformat.tensors.mapped import MappedFile
from loraformat.tensors.torch_arrays import tensor_of
from loraformat.train.engine.matrix import DenseMatrix, Matrix, NF4Matrix
from loraformat.train.engine.readable_base import (
    Computed,
    ComputedTable,
    ReadableBase,
    is_computed,
)

__all__ = ["Sources", "Span", "StoredWeights", "find_sources"]

#: A file, and the first and the end byte of a range in it.
Span = tuple[MappedFile, int, int]


class StoredWeights:
    """The weights of a bundle by name; opening them reads nothing.

    Parameters
    ----------
    bundle : Bundle or ReadableBase
    replaced : mapping of str to DenseTensor, optional
        What takes the place of tensors of the bundle, or is added to them.
    """

    def __init__(
        self,
        bundle: Bundle | ReadableBase,
        replaced: Mapping[str, DenseTensor] | None = None,
    ) -> None:
        replaced = replaced or {}
        self._tensors = {**bundle.tensors, **replaced}
        form = bundle.checkpoint.provenance.format
        self._made = {
            name: tensor
            for name, tensor in self._tensors.items()
            if name not in replaced and is_computed(tensor, form)
        }
        self._computed = Computed()
        self._homes = {
            name: shard
            for shard in bundle.shards
            for name in shard.header.entries
            if name not in replaced
        }

    def names(self) -> list[str]:
        """List all tensors."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape as in the Hugging Face model."""
        return self._tensors[name].shape

    def is_nf4(self, name: str) -> bool:
        """Tell whether a tensor is quantized."""
        return isinstance(self._tensors[name], NF4Tensor)

    def matrix(self, name: str, *, in_out_layout: bool = False) -> Matrix:
        """Return a weight as a matrix on the mapped bytes.

        Parameters
        ----------
        name : str
        in_out_layout : bool
            The Hugging Face tensor is (in features, out features).
        """
        return self.stack(name, in_out_layout=in_out_layout)[0]

    def stack(self, name: str, *, in_out_layout: bool = False) -> list[Matrix]:
        """Return the matrices of a weight of three dimensions; a matrix is a stack of one."""
        tensor = self._tensors[name]
        if isinstance(tensor, NF4Tensor):
            rows, columns = tensor.stored_shape[-2:]
            codes = tensor.codes(tensor.load())
            # Where the codes run over the transpose, the rows are the other features.
            rows_are_inputs = in_out_layout != tensor.transposed
            count = tensor.count // (rows * columns)
            return [
                NF4Matrix(codes, (rows, columns), offset=i * rows * columns,
                          in_out_layout=rows_are_inputs)
                for i in range(count)
            ]  # fmt: skip
        if name in self._made:
            return list(self._computed.stack(self._made[name], in_out_layout=in_out_layout))
        values = self.table(name)
        values = values.view(-1, *values.shape[-2:])
        return [DenseMatrix(part, in_out_layout=in_out_layout) for part in values]

    def rows(self, name: str) -> torch.Tensor | ComputedTable:
        """Return a table of which rows are looked up; see `table`."""
        if name in self._made:
            return self._computed.table(self._made[name])
        return self.table(name)

    def table(self, name: str) -> torch.Tensor:
        """Return a plain tensor as it is stored, on the mapped bytes: for reading.

        An NF4 one is decoded as a whole.
        """
        tensor = self._tensors[name]
        return tensor_of(tensor.array())

    def copy(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """Return a small tensor in memory; floating numbers as `dtype`."""
        values = self.table(name)
        copied = values.to(dtype) if values.is_floating_point() else values
        return copied.clone() if copied is values or copied.data_ptr() == values.data_ptr() else (
            copied
        )  # fmt: skip

    def spans(self, name: str) -> list[Span]:
        """Return the byte ranges that computing with a weight reads."""
        found = []
        for suffix in NF4_PARTS.values() if self.is_nf4(name) else ("",):
            part = name + suffix
            if part in self._homes and suffix not in TAIL_SUFFIXES:
                file = self._homes[part]
                entry = file.header.entries[part]
                start = file.header.data_start
                found.append((file, start + entry.begin, start + entry.end))
        return found


def find_sources(model: Any, names: Iterable[str], path: object) -> Sources:
    """Assign the tensors of a bundle to a model's parameters.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    names : iterable of str
        Of all tensors.
    path : object
        For messages.

    Raises
    ------
    UnsupportedError
        If transformers would compute a parameter from several tensors in another way.
    """
    sources = find_any_sources(model, names)
    computed = sources.computed | dict.fromkeys(sources.chunks, "Chunk")
    for target, how in computed.items():
        raise UnsupportedError(
            f"parameter {printable(target)} is made by {how} when transformers loads it, which "
            "training on mapped weights does not know",
            path=f"{path}",
        )
    return sources
