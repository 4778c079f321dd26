"""Files behind gzip or Zstandard, unpacked once into a temporary file."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from typing import IO, Any, BinaryIO

from loraformat.errors import InputError, MissingDependencyError
from loraformat.train.data.data_file import DataFile
from loraformat.train.data.spooled_rows import spooled

__all__ = ["COMPRESSIONS", "unpacked"]

_AT_ONCE = 1 << 20
#: Text packs into a tenth, lines that repeat each other into a hundredth. More is a trap.
_LARGEST_RATIO, _ALWAYS_TAKEN = 1000, 64 << 20


def unpacked(file: DataFile, suffix: str) -> DataFile:
    """Return what is in a compressed file.

    Parameters
    ----------
    file : DataFile
    suffix : str
        One of `COMPRESSIONS`.

    Raises
    ------
    MissingDependencyError
        If pyarrow is not installed, which unpacks Zstandard.
    InputError
        If it is not sound, or unpacks to a thousand times its size.
    ResourceError
        If the temporary directory is full.
    """
    form, opened = COMPRESSIONS[suffix]
    most = max(file.nbytes * _LARGEST_RATIO, _ALWAYS_TAKEN)

    def write(stream: BinaryIO, spool: IO[bytes]) -> None:
        reader, left = opened(stream), most
        while data := reader.read(_AT_ONCE):
            left -= len(data)
            if left < 0:
                raise InputError(
                    f"unpacks to more than {_LARGEST_RATIO} times its size", path=file.path,
                    hint="unpack it yourself if it is meant",
                )  # fmt: skip
            spool.write(data)

    try:
        return spooled(file, form, write)
    except ImportError:
        raise MissingDependencyError(
            f"{form} needs pyarrow, which is not installed",
            path=file.path,
            hint="run: pip install 'loraformat[data]'; or unpack it: zstd -d",
        ) from None


def _zstandard(stream: BinaryIO) -> Any:
    import pyarrow

    return pyarrow.CompressedInputStream(stream, "zstd")


COMPRESSIONS: dict[str, tuple[str, Callable[[BinaryIO], Any]]] = {
    ".gz": ("gzip", lambda stream: gzip.GzipFile(fileobj=stream)),
    ".zst": ("Zstandard", _zstandard),
}
"""By suffix: a name for messages, and what reads it."""
