"""Rows of compressed files and tables, unpacked into a temporary file for random access.

Compressed files and tables are read once from front to back; a shuffled epoch asks for their rows
in any order. The file has no name, lies in ``TMPDIR``, and is gone when the process ends.
"""

from __future__ import annotations

import errno
import gzip
import json
import tempfile
from collections.abc import Callable, Iterator
from typing import IO, Any, BinaryIO

from loraformat.errors import InputError, LoraFormatError, MissingDependencyError, ResourceError
from loraformat.train.data.data_file import DataFile
from loraformat.train.data.json_file import JsonLines
from loraformat.train.data.row_formats import FIELDS

__all__ = ["COMPRESSIONS", "spooled", "table_rows", "unpacked", "without_nulls"]

_AT_ONCE = 1 << 20
#: Text packs into a tenth, lines that repeat each other into a hundredth. More is a trap.
_LARGEST_RATIO, _ALWAYS_TAKEN = 1000, 64 << 20


def spooled(file: DataFile, form: str, write: Callable[[BinaryIO, IO[bytes]], None]) -> DataFile:
    """Rewrite the contents of a file and return the result.

    Parameters
    ----------
    file : DataFile
    form : str
        What it should be, for messages.
    write : callable
        Reads the first stream and writes the second.

    Raises
    ------
    InputError
        If it is not sound.
    ResourceError
        If the temporary directory is full.
    """
    spool = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the rows
    with file.opened() as stream:
        try:
            write(stream, spool)
            spool.flush()
        except LoraFormatError:
            raise
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise ResourceError(
                    f"no space for the rows of a {form} file",
                    path=tempfile.gettempdir(),
                    hint="choose another directory with TMPDIR",
                ) from None
            raise InputError(f"not sound {form}: {error}", path=file.path) from None
        except Exception as error:  # decoders' trees are wide, and a stranger chose the bytes
            raise InputError(f"not sound {form}: {error}", path=file.path) from None
    return DataFile.spooled(file.path, spool)


def table_rows(
    file: DataFile, form: str, batches: Callable[[BinaryIO], Iterator[Any]]
) -> JsonLines:
    """Open a table through pyarrow.

    Parameters
    ----------
    file : DataFile
    form : str
        For messages.
    batches : callable
        Yields ``pyarrow.RecordBatch`` of a stream; of their columns those are taken that mean
        something to the trainer.

    Raises
    ------
    MissingDependencyError
        If pyarrow is not installed.
    InputError, ResourceError
        As `spooled`.
    """
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        raise MissingDependencyError(
            f"{form} needs pyarrow, which is not installed",
            path=file.path,
            hint="run: pip install 'loraformat[data]'",
        ) from None

    def write(stream: BinaryIO, spool: IO[bytes]) -> None:
        number = 0
        for rows in batches(stream):
            known = rows.select([name for name in rows.schema.names if name in FIELDS])
            for row in known.to_pylist() if known.num_columns else [{}] * rows.num_rows:
                number += 1
                spool.write(_line(row, number, file))

    return JsonLines(spooled(file, form, write), unit="row")


def without_nulls(value: Any) -> Any:
    """Leave out members that are null, at any depth.

    A struct of Arrow has the same members in every row: what is null there was not in the row, or
    was null, and it is not known which.

    Examples
    --------
    >>> without_nulls({"arguments": {"city": "Paris", "unit": None}, "list": [None]})
    {'arguments': {'city': 'Paris'}, 'list': [None]}
    """
    if isinstance(value, dict):
        return {name: without_nulls(one) for name, one in value.items() if one is not None}
    if isinstance(value, list):
        return [without_nulls(one) for one in value]
    return value


def _line(row: dict[str, Any], number: int, file: DataFile) -> bytes:
    try:
        return json.dumps(without_nulls(row), ensure_ascii=False).encode("utf-8") + b"\n"
    except (TypeError, ValueError) as error:
        raise InputError(f"row {number}: holds no text: {error}", path=file.path) from None


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
