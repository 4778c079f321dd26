"""The weights of an open model as matrices, tables and copies, and their byte ranges.

For evaluation and generation a base may be in any format. Mapped formats stay mapped. Tensors that
must be computed, as a GGUF file's blocks, are computed one by one when a layer needs them, and some
of them are kept, within a bound.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeGuard

import torch

from loraformat.bundle.reader import Bundle
from loraformat.errors import UnsupportedError, printable
from loraformat.model.base_names.sources import Sources
from loraformat.model.base_names.sources import find_sources as find_any_sources
from loraformat.model.checkpoint import Checkpoint, DenseTensor, LazyTensor, NF4Tensor
from loraformat.model.config_json import CONFIG_NAME
from loraformat.model.nf4_parts import SEGMENT_PARTS
from loraformat.shards.layout import TAIL_SUFFIXES
from loraformat.tensors.mapped import MappedFile
from loraformat.tensors.torch_arrays import tensor_of
from loraformat.train.engine.matrix import DenseMatrix, Matrix, NF4Matrix

__all__ = [
    "ComputedTable",
    "ReadableBase",
    "Sources",
    "Span",
    "StoredWeights",
    "find_sources",
    "is_computed",
    "share_of_spans",
]

#: Formats whose dense tensors are views on mapped files, where they have the type of their file.
_MAPPED = ("loraformat", "safetensors", "bitsandbytes")
#: What of computed tensors is kept at most, besides the last one (bytes).
_KEPT = 1 << 30


class ReadableBase:
    """An open model of any format, with what it takes of a `Bundle` to compute with one.

    Attributes
    ----------
    checkpoint : Checkpoint
        Closed with it.
    path, directory : Path
        For messages; where its tokenizer is: of a file that holds one, a copy.
    tensors : mapping of str to LazyTensor
    shards : tuple of MappedFile
        None are known: the kernel keeps of mapped files what it has room for.
    """

    shards: tuple[MappedFile, ...] = ()

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint, self.path = checkpoint, checkpoint.path
        self.tensors = checkpoint.tensors
        self._opened = ExitStack()
        self._opened.callback(checkpoint.close)
        self.directory = self.path if self.path.is_dir() else self._copied()

    def _copied(self) -> Path:
        """Write the small files that the model's file holds."""
        place = Path(self._opened.enter_context(TemporaryDirectory(prefix="loraformat-")))
        for file in self.checkpoint.files:
            (place / file.path).parent.mkdir(parents=True, exist_ok=True)
            (place / file.path).write_bytes(file.read())
        if self.checkpoint.config is not None:
            (place / CONFIG_NAME).write_bytes(self.checkpoint.config)
        return place

    def close(self) -> None:
        """Close the model's files."""
        self._opened.close()


def is_computed(tensor: LazyTensor, format_name: str) -> TypeGuard[DenseTensor]:
    """Tell whether a tensor is computed when it is loaded, instead of mapped."""
    return isinstance(tensor, DenseTensor) and (
        tensor.stored is not None or format_name not in _MAPPED
    )


class _Kept:
    """The tensors that were computed last."""

    def __init__(self) -> None:
        self._tensors: OrderedDict[int, torch.Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, tensor: DenseTensor) -> torch.Tensor:
        """Return a tensor's numbers, computed now unless they are kept."""
        with self._lock:
            found = self._tensors.pop(id(tensor), None)
            if found is None:
                found = tensor_of(tensor.array())
                held = sum(other.nbytes for other in self._tensors.values())
                while self._tensors and held + found.nbytes > _KEPT:
                    held -= self._tensors.popitem(last=False)[1].nbytes
            self._tensors[id(tensor)] = found
            return found


class _ComputedMatrix(DenseMatrix):
    """A matrix that is computed on access."""

    def __init__(
        self, compute: Callable[[], torch.Tensor], shape: tuple[int, int], *,
        in_out_layout: bool = False,
    ) -> None:  # fmt: skip
        Matrix.__init__(self, shape, in_out_layout=in_out_layout)
        self._compute = compute

    @property
    def values(self) -> torch.Tensor:  # type: ignore[override]
        """Two-dimensional; computed now, or kept since."""
        return self._compute()


class ComputedTable:
    """A table for row lookups that is computed on access.

    Examples
    --------
    >>> table = ComputedTable(lambda: torch.tensor([[1.0], [2.0]]), (2, 1))
    >>> table[torch.tensor([1])], table.device
    (tensor([[2.]]), device(type='cpu'))
    """

    device = torch.device("cpu")

    def __init__(self, compute: Callable[[], torch.Tensor], shape: tuple[int, ...]) -> None:
        self._compute, self.shape = compute, torch.Size(shape)

    def __getitem__(self, rows: torch.Tensor) -> torch.Tensor:
        return self._compute()[rows]

    def matrix(self) -> DenseMatrix:
        """Return it as a matrix."""
        return _ComputedMatrix(self._compute, (self.shape[0], self.shape[1]))


#: A file, and the first and the end byte of a range in it.
Span = tuple[MappedFile, int, int]


def share_of_spans(spans: Iterable[Span], start: int, stop: int, count: int) -> list[Span]:
    """Return the bytes of parts `start` to `stop` of a tensor that consists of `count` equal ones.

    Each span is divided in proportion, as dense numbers, packed codes and scales are.

    Examples
    --------
    >>> share_of_spans([(None, 100, 140), (None, 300, 304)], 1, 2, 4)
    [(None, 110, 120), (None, 301, 302)]
    """
    found = []
    for file, begin, end in spans:
        size = end - begin
        found.append((file, begin + size * start // count, begin + -(-size * stop // count)))
    return found


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
        self._kept = _Kept()
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

        In `in_out_layout` the Hugging Face tensor is (in features, out features).
        """
        return self.stack(name, in_out_layout=in_out_layout)[0][0]

    def stack(self, name: str, *, in_out_layout: bool = False) -> list[list[Matrix]]:
        """Return the matrices of a weight of three dimensions; a matrix is a stack of one.

        Each is a list: of one, or of those that lie one below the other in it.
        """
        tensor = self._tensors[name]
        if isinstance(tensor, NF4Tensor):
            return _quantized_stack(tensor, in_out_layout)
        if name in self._made:
            made, shape = self._made[name], (tensor.shape[-2], tensor.shape[-1])

            def part(number: int) -> torch.Tensor:
                return self._kept.of(made).view(-1, *shape)[number]

            return [
                [_ComputedMatrix(partial(part, i), shape, in_out_layout=in_out_layout)]
                for i in range(tensor.count // max(1, shape[0] * shape[1]))
            ]
        values = self.table(name)
        values = values.view(-1, *values.shape[-2:])
        return [[DenseMatrix(part, in_out_layout=in_out_layout)] for part in values]

    def rows(self, name: str) -> torch.Tensor | ComputedTable:
        """Return a table of which rows are looked up; see `table`."""
        if name in self._made:
            return ComputedTable(partial(self._kept.of, self._made[name]), self.shape(name))
        return self.table(name)

    def table(self, name: str) -> torch.Tensor:
        """Return a plain tensor as it is stored, on the mapped bytes: for reading.

        An NF4 one is decoded as a whole.
        """
        return tensor_of(self._tensors[name].array())

    def copy(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """Return a small tensor in memory; floating numbers as `dtype`."""
        values = self.table(name)
        return values.to(dtype if values.is_floating_point() else values.dtype, copy=True)

    def spans(self, name: str) -> list[Span]:
        """Return the byte ranges that computing with a weight reads."""
        found = []
        for suffix in SEGMENT_PARTS.values() if self.is_nf4(name) else ("",):
            part = name + suffix
            if part in self._homes and suffix not in TAIL_SUFFIXES:
                file = self._homes[part]
                entry = file.header.entries[part]
                start = file.header.data_start
                found.append((file, start + entry.begin, start + entry.end))
        return found


def _quantized_stack(tensor: NF4Tensor, in_out_layout: bool) -> list[list[Matrix]]:
    rows, columns = tensor.stored_shape[-2:]
    count = tensor.count // (rows * columns)
    segments = tensor.segment_codes(tensor.load())
    # Where the codes run over the transpose, the rows are the other features.
    rows_are_inputs = in_out_layout != tensor.transposed
    if tensor.segments is None:
        return [
            [NF4Matrix(segments[0], (rows, columns), offset=i * rows * columns,
                       in_out_layout=rows_are_inputs)]
            for i in range(count)
        ]  # fmt: skip
    parts = tensor.segments // count
    if parts > 1 and rows_are_inputs:
        raise UnsupportedError(
            f"tensor {printable(tensor.name)} has {parts} segments in each matrix, across its "
            "outputs, which training does not know"
        )
    shape = rows // parts, columns
    matrices = [NF4Matrix(one, shape, in_out_layout=rows_are_inputs) for one in segments]
    return [list(matrices[i : i + parts]) for i in range(0, len(matrices), parts)]


def find_sources(model: Any, names: Iterable[str], path: object) -> Sources:
    """Assign the tensors of a bundle, of which all names are given, to a model's parameters.

    Raises
    ------
    UnsupportedError
        If transformers would compute a parameter from several tensors in another way.
    """
    sources = find_any_sources(model, names)
    for target, how in (sources.computed | dict.fromkeys(sources.chunks, "Chunk")).items():
        raise UnsupportedError(
            f"parameter {printable(target)} is made by {how} when transformers loads it, which "
            "training on mapped weights does not know",
            path=f"{path}",
        )
    return sources
