"""Temporary storage of computed factors in an unnamed file."""

from __future__ import annotations

import os
import tempfile

from loraformat.model.checkpoint import DenseTensor
from loraformat.ops.deltas.factors import rounded
from loraformat.tensors.arrays import Array, array_bytes

__all__ = ["Spool"]


class Spool:
    """A temporary file for tensors that must all exist before the first is written.

    The file has no name, so that nothing is left behind whatever happens.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the adapter

    def put(self, name: str, values: Array, dtype: str) -> DenseTensor:
        """Store an array, rounded to a dtype, and return it as a lazy tensor.

        Parameters
        ----------
        name : str
        values : array
        dtype : str
            safetensors name.

        Raises
        ------
        InputError
            If a value lies beyond the dtype's range.
        """
        start = self._file.seek(0, os.SEEK_END)
        nbytes = self._file.write(array_bytes(rounded(values, dtype, name)))
        self._file.flush()

        def load() -> memoryview:
            self._file.seek(start)
            return memoryview(self._file.read(nbytes))

        return DenseTensor(name, dtype, values.shape, load)

    def close(self) -> None:
        """Free the space; stored tensors can no longer be loaded."""
        self._file.close()
