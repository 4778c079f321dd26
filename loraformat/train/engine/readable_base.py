"""A base in any format, opened for evaluation and generation but not for training.

Mapped formats stay mapped. Tensors that must be computed, as a GGUF file's blocks, are computed one
by one when a layer needs them, and some of them are kept, within a bound.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeGuard

import torch

from loraformat.model.checkpoint import Checkpoint, DenseTensor, LazyTensor
from loraformat.model.config_json import CONFIG_NAME
from loraformat.tensors.mapped import MappedFile
from loraformat.tensors.torch_arrays import tensor_of
from loraformat.train.engine.matrix import DenseMatrix

__all__ = ["Computed", "ComputedMatrix", "ComputedTable", "ReadableBase", "is_computed"]

#: Formats whose dense tensors are views on mapped files, where they have the type of their file.
_MAPPED = ("loraformat", "safetensors", "bitsandbytes")
#: What of computed tensors is kept at most, besides the last one (bytes).
_KEPT = 1 << 30


class ReadableBase:
    """An open model: what of a `Bundle` it takes to compute with one.

    Parameters
    ----------
    checkpoint : Checkpoint
        Closed with it.

    Attributes
    ----------
    checkpoint : Checkpoint
    path : Path
        For messages.
    directory : Path
        Where its tokenizer lies: of a file that holds one, a copy.
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
    """Tell whether the numbers of a tensor are made when they are loaded."""
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


class Computed:
    """Makes matrices and tables of tensors that are computed when they are loaded."""

    def __init__(self) -> None:
        self._kept = _Kept()

    def stack(self, tensor: DenseTensor, *, in_out_layout: bool) -> list[ComputedMatrix]:
        """Return the matrices of a tensor of two or three dimensions."""
        shape = (tensor.shape[-2], tensor.shape[-1])
        count = tensor.count // max(1, shape[0] * shape[1])

        def part(number: int) -> torch.Tensor:
            return self._kept.of(tensor).view(-1, *shape)[number]

        return [
            ComputedMatrix(partial(part, i), shape, in_out_layout=in_out_layout)
            for i in range(count)
        ]

    def table(self, tensor: DenseTensor) -> ComputedTable:
        """Return a table of rows."""
        return ComputedTable(partial(self._kept.of, tensor), tensor.shape)


class ComputedMatrix(DenseMatrix):
    """A matrix whose numbers are computed when they are wanted.

    Parameters
    ----------
    compute : callable
        Returns them.
    shape : tuple of int
    in_out_layout : bool
        As in `Matrix`.

    Examples
    --------
    >>> ComputedMatrix(lambda: torch.ones(2, 3), (2, 3)).block((0, 1), (0, 2), torch.float32)
    tensor([[1., 1.]])
    """

    def __init__(
        self, compute: Callable[[], torch.Tensor], shape: tuple[int, int], *,
        in_out_layout: bool = False,
    ) -> None:  # fmt: skip
        self._compute = compute
        self.in_out_layout = in_out_layout
        self.rows, self.columns = shape
        self.device = torch.device("cpu")

    @property
    def values(self) -> torch.Tensor:  # type: ignore[override]
        """Two-dimensional; computed now, or kept since."""
        return self._compute()


class ComputedTable:
    """What of a tensor a lookup of rows wants, of one that is computed when it is wanted.

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
        return ComputedMatrix(self._compute, (self.shape[0], self.shape[1]))
