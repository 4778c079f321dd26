"""Parquet, through pyarrow.

Rows of Parquet can only be had with the whole row group around them, tens of megabytes unpacked, so
that they are written into a temporary file.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO

from loraformat.errors import InputError
from loraformat.train.data.data_file import DataFile
from loraformat.train.data.json_lines import JsonLines
from loraformat.train.data.row_formats import FIELDS
from loraformat.train.data.spooled_rows import table_rows

__all__ = ["open_parquet"]

_MAGIC = b"PAR1"
_LARGEST_FOOTER = 64 << 20
_ROWS_AT_ONCE = 128


def open_parquet(file: DataFile) -> JsonLines:
    """Open the columns of a Parquet file that mean something to the trainer.

    Raises
    ------
    MissingDependencyError
        If pyarrow is not installed.
    InputError
        If it is not sound Parquet.
    ResourceError
        If the temporary directory is full.
    """
    _check_frame(file)
    return table_rows(file, "Parquet", _batches)


def _batches(stream: BinaryIO) -> Iterator[Any]:
    import pyarrow.parquet

    table = pyarrow.parquet.ParquetFile(stream)
    columns = [name for name in table.schema_arrow.names if name in FIELDS]
    yield from table.iter_batches(_ROWS_AT_ONCE, columns=columns)


def _check_frame(file: DataFile) -> None:
    size = file.nbytes
    sound = size >= 12 and file.between(0, 4) == _MAGIC == file.between(size - 4, size)
    footer = int.from_bytes(file.between(size - 8, size - 4), "little") if sound else 0
    if not sound or not 0 < footer <= min(size - 12, _LARGEST_FOOTER):
        raise InputError(
            f"not Parquet: wanted PAR1 at both ends and a footer of at most {_LARGEST_FOOTER} "
            "bytes inside the file",
            path=file.path,
        )
