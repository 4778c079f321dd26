"""Parquet, through pyarrow: read once from front to back into a temporary file of JSON Lines.

Rows of Parquet can only be had with the whole row group around them, tens of megabytes
unpacked, and a shuffled epoch asks for them in any order. The temporary file has no name,
lies in ``TMPDIR``, and is gone when the process ends.
"""

from __future__ import annotations

import errno
import json
import tempfile
from typing import Any

from loraformat.errors import InputError, LoraFormatError, MissingDependencyError, ResourceError
from loraformat.train.data.data_file import DataFile
from loraformat.train.data.json_lines import JsonLines
from loraformat.train.data.kinds import FIELDS

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
    try:
        import pyarrow.parquet
    except ImportError:
        raise MissingDependencyError(
            "Parquet needs pyarrow, which is not installed",
            path=file.path,
            hint="run: pip install 'loraformat[data]'",
        ) from None
    spool = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the rows
    with file.opened() as stream:
        try:
            table = pyarrow.parquet.ParquetFile(stream)
            columns = [name for name in table.schema_arrow.names if name in FIELDS]
            number = 0
            for rows in table.iter_batches(_ROWS_AT_ONCE, columns=columns):
                for row in rows.to_pylist():
                    number += 1
                    spool.write(_line(row, number, file))
            spool.flush()
        except LoraFormatError:
            raise
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise ResourceError(
                    "no space for the rows of a Parquet file",
                    path=tempfile.gettempdir(),
                    hint="name another directory with TMPDIR",
                ) from None
            raise InputError(f"not sound Parquet: {error}", path=file.path) from None
        except Exception as error:  # pyarrow's tree is wide, and a stranger chose the bytes
            raise InputError(f"not sound Parquet: {error}", path=file.path) from None
    return JsonLines(DataFile.spooled(file.path, spool), unit="row")


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


def _line(row: dict[str, Any], number: int, file: DataFile) -> bytes:
    try:
        return json.dumps(row, ensure_ascii=False).encode("utf-8") + b"\n"
    except (TypeError, ValueError) as error:
        raise InputError(f"row {number}: holds no text: {error}", path=file.path) from None
