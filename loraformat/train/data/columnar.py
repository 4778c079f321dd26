"""Rows of Arrow and Parquet files, and of directories that ``Dataset.save_to_disk`` writes.

Rows of a table can only be had with the whole batch or row group around them, tens of megabytes
unpacked, so they are written into a temporary file (`loraformat.train.data.spooled_rows`).

A saved data set has a ``state.json`` that names its Arrow files in order; a directory of splits has
a ``dataset_dict.json``. Both are read without ``datasets``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from loraformat.errors import InputError, printable
from loraformat.storage import strict_json
from loraformat.storage.safe_directory import SafeDirectory
from loraformat.train.data.data_file import DataFile
from loraformat.train.data.json_file import JsonLines
from loraformat.train.data.row import RowSource
from loraformat.train.data.row_formats import FIELDS
from loraformat.train.data.spooled_rows import table_rows

__all__ = ["has_splits", "is_saved", "open_arrow", "open_parquet", "open_saved"]

_STATE, _INFO, _SPLITS = "state.json", "dataset_info.json", "dataset_dict.json"
_LARGEST_STATE = 16 << 20

_ARROW_MAGIC = b"ARROW1"

_PARQUET_MAGIC = b"PAR1"
_LARGEST_FOOTER = 64 << 20
_ROWS_AT_ONCE = 128


def is_saved(directory: Path) -> bool:
    """Tell whether a directory is a saved data set, or one of several splits."""
    return has_splits(directory) or all((directory / n).is_file() for n in (_STATE, _INFO))


def has_splits(directory: Path) -> bool:
    """Tell whether a directory is a data set of several splits."""
    return (directory / _SPLITS).is_file()


def open_saved(directory: Path, split: str) -> list[RowSource]:
    """Open the files of a saved data set.

    Parameters
    ----------
    directory : Path
    split : str
        If there are several.

    Raises
    ------
    InputError
        If there is no such split, or the directory is not sound.
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
    return table_rows(file, "Arrow", _arrow_batches)


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
    return table_rows(file, "Parquet", _parquet_batches)


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
