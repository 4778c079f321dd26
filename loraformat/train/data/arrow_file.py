"""Arrow files, as ``datasets`` keeps its tables: a stream of batches, or the format for files."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO

from loraformat.train.data.data_file import DataFile
from loraformat.train.data.json_lines import JsonLines
from loraformat.train.data.spooled_rows import table_rows

__all__ = ["open_arrow"]

_MAGIC = b"ARROW1"


def open_arrow(file: DataFile) -> JsonLines:
    """Open the columns of an Arrow file that mean something to the trainer.

    Raises
    ------
    MissingDependencyError
        If pyarrow is not installed.
    InputError
        If it is not sound Arrow.
    ResourceError
        If the temporary directory is full.
    """
    return table_rows(file, "Arrow", _batches)


def _batches(stream: BinaryIO) -> Iterator[Any]:
    import pyarrow.ipc

    begin = stream.read(len(_MAGIC))
    stream.seek(0)
    if begin == _MAGIC:
        reader = pyarrow.ipc.open_file(stream)
        yield from map(reader.get_batch, range(reader.num_record_batches))
    else:
        yield from pyarrow.ipc.open_stream(stream)
