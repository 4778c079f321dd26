"""Rows of compressed files, Arrow and Parquet tables, unpacked into a temporary file.

Compressed files and tables are read once from front to back; a shuffled epoch asks for their rows
in any order. The file has no name, lies in ``TMPDIR``, and is gone when the process ends.

Rows of a table can only be had with the whole batch or row group around them, tens of megabytes
unpacked. A data set that ``Dataset.save_to_disk`` wrote has a ``state.json`` that names its Arrow
files in order; a directory of splits has a ``dataset_dict.json``. Both are read without
``datasets``.
"""

from __future__ import annotations

import errno
import gzip
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO

from loraformat.errors import (
    InputError,
    LoraFormatError,
    MissingDependencyError,
    ResourceError,
    printable,
)
from loraformat.storage import strict_json
from loraformat.storage.safe_directory import SafeDirectory
from loraformat.train.data.json_file import JsonLines
from loraformat.train.data.row import DataFile, RowSource
from loraformat.train.data.row_formats import FIELDS

__all__ = [
    "COMPRESSIONS",
    "has_splits",
    "is_saved",
    "open_arrow",
    "open_parquet",
    "open_saved",
    "unpacked",
    "without_nulls",
]

_AT_ONCE = 1 << 20
#: Text packs into a tenth, lines that repeat each other into a hundredth. More is a trap.
_LARGEST_RATIO, _ALWAYS_TAKEN = 1000, 64 << 20
_STATE, _INFO, _SPLITS = "state.json", "dataset_info.json", "dataset_dict.json"
_LARGEST_STATE = 16 << 20
_ARROW_MAGIC = b"ARROW1"
_PARQUET_MAGIC = b"PAR1"
_LARGEST_FOOTER = 64 << 20
_ROWS_AT_ONCE = 128


def _spooled(file: DataFile, form: str, write: Callable[[BinaryIO, IO[bytes]], None]) -> DataFile:
    """Rewrite the contents of a file and return the result."""
    spool = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the rows
    with file.opened() as stream:
        try:
            write(stream, spool)
            spool.flush()
        except LoraFormatError:
            raise
        except Exception as error:  # decoders' trees are wide, and a stranger chose the bytes
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise ResourceError(
                    f"no space for the rows of a {form} file",
                    path=tempfile.gettempdir(),
                    hint="choose another directory with TMPDIR",
                ) from None
            raise InputError(f"not sound {form}: {error}", path=file.path) from None
    return DataFile.spooled(file.path, spool)


def _table_rows(
    file: DataFile, form: str, batches: Callable[[BinaryIO], Iterator[Any]]
) -> JsonLines:
    """Open a table through pyarrow."""
    _check_pyarrow(file, form)

    def write(stream: BinaryIO, spool: IO[bytes]) -> None:
        number = 0
        for rows in batches(stream):
            known = rows.select([name for name in rows.schema.names if name in FIELDS])
            for row in known.to_pylist() if known.num_columns else [{}] * rows.num_rows:
                number += 1
                try:
                    line = json.dumps(without_nulls(row), ensure_ascii=False).encode("utf-8")
                except (TypeError, ValueError) as error:
                    problem = f"row {number}: holds no text: {error}"
                    raise InputError(problem, path=file.path) from None
                spool.write(line + b"\n")

    return JsonLines(_spooled(file, form, write), unit="row")


def _check_pyarrow(file: DataFile, form: str, or_else: str = "") -> None:
    try:
        import pyarrow  # noqa: F401 - it may be installed, and no memory left to map it
    except ImportError:
        raise MissingDependencyError(
            f"{form} needs pyarrow, which is not installed",
            path=file.path,
            hint=f"run: pip install 'loraformat[data]'{or_else}",
        ) from None


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


def unpacked(file: DataFile, suffix: str) -> DataFile:
    """Return what is in a compressed file, which is packed as `COMPRESSIONS` says of its suffix.

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
    if opened is _zstandard:
        _check_pyarrow(file, form, "; or unpack it: zstd -d")
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

    return _spooled(file, form, write)


def _zstandard(stream: BinaryIO) -> Any:
    import pyarrow

    return pyarrow.CompressedInputStream(stream, "zstd")


COMPRESSIONS: dict[str, tuple[str, Callable[[BinaryIO], Any]]] = {
    ".gz": ("gzip", lambda stream: gzip.GzipFile(fileobj=stream)),
    ".zst": ("Zstandard", _zstandard),
}
"""By suffix: a name for messages, and what reads it."""


def is_saved(directory: Path) -> bool:
    """Tell whether a directory is a saved data set, or one of several splits."""
    return has_splits(directory) or all((directory / n).is_file() for n in (_STATE, _INFO))


def has_splits(directory: Path) -> bool:
    """Tell whether a directory is a data set of several splits."""
    return (directory / _SPLITS).is_file()


def open_saved(directory: Path, split: str) -> list[RowSource]:
    """Open the files of a saved data set, those of the split if it has several.

    InputError says that there is no such split, or that the directory is not sound.
    """
    folder, within = SafeDirectory(directory), ""
    if has_splits(directory):
        splits = _read(folder, _SPLITS).get("splits")
        if not isinstance(splits, list) or split not in splits:
            known = ", ".join(map(str, splits)) if isinstance(splits, list) else "nothing"
            raise InputError(
                f"has no split {split!r}; it has {printable(known)}",
                path=directory,
                hint="choose one with --split",
            )
        within = f"{split}/"
    files = _read(folder, within + _STATE).get("_data_files")
    if not isinstance(files, list):
        files = []
    found = [one.get("filename") for one in files if isinstance(one, dict)]
    names = [name for name in found if isinstance(name, str)]
    if not names or len(names) != len(found):
        raise InputError(f"{within}{_STATE} names no files", path=directory)
    return [open_arrow(DataFile.inside(folder, within + name)) for name in names]


def _read(folder: SafeDirectory, name: str) -> dict[str, Any]:
    try:
        found = strict_json.loads(folder.read(name, _LARGEST_STATE))
    except strict_json.StrictJsonError as error:
        raise InputError(f"{name} is not JSON: {error}", path=folder.path) from None
    if not isinstance(found, dict):
        raise InputError(f"{name} is not a JSON object", path=folder.path)
    return found


def open_arrow(file: DataFile) -> JsonLines:
    """Open the columns of an Arrow file that mean something to the trainer."""
    return _table_rows(file, "Arrow", _arrow_batches)


def _arrow_batches(stream: BinaryIO) -> Iterator[Any]:
    import pyarrow.ipc

    begin = stream.read(len(_ARROW_MAGIC))
    stream.seek(0)
    if begin == _ARROW_MAGIC:
        reader = pyarrow.ipc.open_file(stream)
        yield from map(reader.get_batch, range(reader.num_record_batches))
    else:
        yield from pyarrow.ipc.open_stream(stream)


def open_parquet(file: DataFile) -> JsonLines:
    """Open the columns of a Parquet file that mean something to the trainer."""
    _check_frame(file)
    return _table_rows(file, "Parquet", _parquet_batches)


def _parquet_batches(stream: BinaryIO) -> Iterator[Any]:
    import pyarrow.parquet

    table = pyarrow.parquet.ParquetFile(stream)
    columns = [name for name in table.schema_arrow.names if name in FIELDS]
    yield from table.iter_batches(_ROWS_AT_ONCE, columns=columns)


def _check_frame(file: DataFile) -> None:
    size = file.nbytes
    sound = size >= 12 and file.between(0, 4) == _PARQUET_MAGIC == file.between(size - 4, size)
    footer = int.from_bytes(file.between(size - 8, size - 4), "little") if sound else 0
    if not sound or not 0 < footer <= min(size - 12, _LARGEST_FOOTER):
        raise InputError(
            f"not Parquet: wanted PAR1 at both ends and a footer of at most {_LARGEST_FOOTER} "
            "bytes inside the file",
            path=file.path,
        )
