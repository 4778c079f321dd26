"""Temporary storage of what is computed before the first of it can be written."""

from __future__ import annotations

import os
import tempfile
import threading
from pathlib import Path
from typing import BinaryIO

from loraformat.model.checkpoint import DenseTensor
from loraformat.ops.deltas.factors import rounded
from loraformat.storage.durable import write_all
from loraformat.tensors.arrays import Array, array_bytes

__all__ = ["Spool"]

_COPY_BYTES = 1 << 20


class Spool:
    """A temporary file without a name, so that nothing is left behind whatever happens.

    It lies in `directory`, by default in the system's for temporary files.
    """

    def __init__(self, directory: Path | None = None) -> None:
        self._file = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115 - closed by `close`
        self._lock = threading.Lock()

    def append(self, data: bytes | memoryview) -> tuple[int, int]:
        """Store bytes; return their offset and length."""
        with self._lock:
            begin = self._file.seek(0, os.SEEK_END)
            self._file.write(data)
            return begin, len(data)

    def copy(self, piece: tuple[int, int], target: BinaryIO) -> None:
        """Copy stored bytes to another file."""
        position, left = piece
        while left:
            self._file.seek(position)
            data = self._file.read(min(left, _COPY_BYTES))
            write_all(target, data)
            position, left = position + len(data), left - len(data)

    def put(self, name: str, values: Array, dtype: str) -> DenseTensor:
        """Store an array, rounded to a dtype, and return it as a lazy tensor.

        Raises
        ------
        InputError
            If a value lies beyond the dtype's range.
        """
        start, nbytes = self.append(array_bytes(rounded(values, dtype, name)))

        def load() -> memoryview:
            self._file.seek(start)
            return memoryview(self._file.read(nbytes))

        return DenseTensor(name, dtype, values.shape, load)

    def close(self) -> None:
        """Free the space; what is stored can no longer be read."""
        self._file.close()
