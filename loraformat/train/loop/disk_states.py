"""Tensors that live in a file without a name, so that memory need not hold them.

The kernel writes their pages back and drops them when it wants the memory; nothing stays on
the disk when the process ends, however it ends.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from loraformat.errors import UsageError
from loraformat.storage.atomic_output import disk_full

__all__ = ["DiskStates"]

_ALIGNMENT = 64


class DiskStates:
    """Zeros on a disk, as float32 tensors.

    Parameters
    ----------
    directory : Path
        On whose disk they are to lie.
    shapes : sequence of tuple of int

    Attributes
    ----------
    tensors : list of torch.Tensor
        float32, of these shapes, shared with the file.

    Raises
    ------
    ResourceError
        If the disk has no room; it is reserved at once, since a mapped file that runs out of
        it would end the process later.
    """

    def __init__(self, directory: Path, shapes: Sequence[Sequence[int]]) -> None:
        if not hasattr(mmap, "MADV_DONTNEED") or not hasattr(os, "posix_fallocate"):
            raise UsageError("optimizer states on disk need Linux", hint="keep them in memory")
        counts = [torch.Size(shape).numel() for shape in shapes]
        starts = [0]
        for count in counts:
            starts.append(starts[-1] + -(-count * 4 // _ALIGNMENT) * _ALIGNMENT)
        self.nbytes = max(starts[-1], _ALIGNMENT)
        self._map = self._reserve(directory)
        self.tensors = [
            torch.frombuffer(self._map, dtype=torch.float32, count=count, offset=start).view(*shape)
            if count
            else torch.zeros(*shape)
            for count, start, shape in zip(counts, starts, shapes, strict=False)
        ]

    def _reserve(self, directory: Path) -> mmap.mmap:
        try:
            with tempfile.TemporaryFile(dir=directory) as file:
                os.posix_fallocate(file.fileno(), 0, self.nbytes)
                return mmap.mmap(file.fileno(), self.nbytes)
        except OSError as error:
            raise disk_full(error, directory) from error

    def release(self) -> None:
        """Take the pages out of this process; they stay in the file."""
        with contextlib.suppress(OSError):
            self._map.madvise(mmap.MADV_DONTNEED)
