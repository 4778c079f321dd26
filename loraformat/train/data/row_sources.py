"""Sources of rows by name: a file, a directory of files, or a data set on the Hugging Face Hub."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from loraformat.errors import HubError, InputError, MissingDependencyError, UsageError, printable
from loraformat.hub.source import hub_id
from loraformat.storage.safe_directory import SafeDirectory
from loraformat.train.data.csv_file import CsvRows
from loraformat.train.data.json_file import JsonLines, open_json
from loraformat.train.data.options import DataOptions
from loraformat.train.data.row import DataFile, Row, RowSource
from loraformat.train.data.row_formats import FIELDS
from loraformat.train.data.spooled_rows import (
    COMPRESSIONS,
    has_splits,
    is_saved,
    open_arrow,
    open_parquet,
    open_saved,
    unpacked,
    without_nulls,
)
from loraformat.train.data.text_file import TextFile, piece_size

__all__ = ["SUFFIXES", "HubRows", "is_local", "open_hub", "open_sources"]

_MAX_DEPTH = 32
_MAX_FILES = 1_000_000

_OPENERS: dict[str, Callable[[DataFile, DataOptions], RowSource]] = {
    ".jsonl": lambda file, options: JsonLines(file),
    ".ndjson": lambda file, options: JsonLines(file),
    ".json": lambda file, options: open_json(file),
    ".csv": lambda file, options: CsvRows(file, ","),
    ".tsv": lambda file, options: CsvRows(file, "\t"),
    ".parquet": lambda file, options: open_parquet(file),
    ".arrow": lambda file, options: open_arrow(file),
    ".txt": lambda file, options: TextFile(
        file, paragraphs=options.split_text == "paragraphs", longest=piece_size(options.seq_len)
    ),
}
SUFFIXES = tuple(_OPENERS)
"""Of files that hold rows; each may have one of a compression behind it."""


def open_sources(
    names: str | PathLike[str] | Sequence[str | PathLike[str]], options: DataOptions
) -> list[RowSource]:
    """Open everything that is named, in that order; the files of a directory sorted by name.

    Raises
    ------
    InputError
        If something is missing, leads out of its directory, or is damaged.
    UsageError
        If a subset or a split is asked for, and all that is named is files.

    Examples
    --------
    >>> open_sources("missing.jsonl", DataOptions())
    Traceback (most recent call last):
    loraformat.errors.InputError: missing.jsonl: no such file or directory
    """
    listed = [names] if isinstance(names, (str, PathLike)) else names
    if all(map(is_local, listed)):
        _refuse_hub_options(options, split=not any(has_splits(Path(name)) for name in listed))
    return [source for name in listed for source in _open(fspath(name), options)]


def is_local(name: str | PathLike[str]) -> bool:
    """Tell whether a name is a local file or directory, and not a Hub id."""
    return os.path.lexists(name)


def _refuse_hub_options(options: DataOptions, *, split: bool) -> None:
    usual = DataOptions()
    for name in ("subset", "split") if split else ("subset",):
        given = getattr(options, name)
        if given != getattr(usual, name):
            raise UsageError(
                f"{name} is {given!r}, and the data are files, which have none",
                hint=f"leave --{name} out and name the files that are wanted, or name a dataset "
                "on the Hub",
            )


def _open(name: str, options: DataOptions) -> list[RowSource]:
    path = Path(name)
    if path.is_dir():
        if is_saved(path):
            return open_saved(path, options.split)
        return _directory(path, options)
    hub = hub_id(name)
    if not is_local(path):
        if hub is None or _suffixes(name) is not None:
            raise InputError("no such file or directory", path=path)
        return [open_hub(*hub, options.subset, options.split)]
    if _suffixes(name) is None:
        raise InputError(
            f"suffix {path.suffix.lower() or 'missing'} says nothing about what is in it",
            path=path,
            hint=f"name it {', '.join(SUFFIXES)}, with {' or '.join(COMPRESSIONS)} behind that if "
            "it is compressed",
        )
    return [_file(DataFile.at(path), name, options)]


def _suffixes(name: str) -> tuple[str, str] | None:
    """Return a file's format and compression by its suffixes; None if it holds no rows."""
    path = Path(name.lower())
    packed = path.suffix if path.suffix in COMPRESSIONS else ""
    suffix = path.with_suffix("").suffix if packed else path.suffix
    return (suffix, packed) if suffix in _OPENERS else None


def _file(file: DataFile, name: str, options: DataOptions) -> RowSource:
    found = _suffixes(name)
    assert found is not None
    suffix, packed = found
    return _OPENERS[suffix](unpacked(file, packed) if packed else file, options)


def _directory(path: Path, options: DataOptions) -> list[RowSource]:
    folder = SafeDirectory(path)
    sources = [_file(DataFile.inside(folder, name), name, options) for name in _walk(path, "", 0)]
    if not sources:
        raise InputError(f"holds no file named {', '.join(SUFFIXES)}", path=path)
    return sources


def _walk(directory: Path, prefix: str, depth: int) -> Iterator[str]:
    if depth > _MAX_DEPTH:
        raise InputError(f"deeper than {_MAX_DEPTH} directories", path=directory)
    entries = sorted(os.scandir(directory), key=lambda entry: entry.name)
    if len(entries) > _MAX_FILES:
        raise InputError(f"holds more than {_MAX_FILES} files", path=directory)
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(Path(entry.path), f"{prefix}{entry.name}/", depth + 1)
        elif _suffixes(entry.name) is not None:
            yield f"{prefix}{entry.name}"
        elif entry.is_dir():
            raise InputError(
                "is a link to a directory, which is not followed",
                path=entry.path,
                hint="name that directory, too, if you want it",
            )


class HubRows:
    """The rows of one split; ``datasets`` keeps them on disk and maps them.

    Columns of the table that mean nothing to the trainer are never read.
    """

    def __init__(self, name: str, table: Any) -> None:
        self.name = name
        known = [column for column in table.column_names if column in FIELDS]
        if not known:
            raise InputError(
                f"columns {printable(', '.join(table.column_names))}; "
                f"wanted some of {', '.join(sorted(FIELDS))}",
                path=name,
            )
        self._table = table.select_columns(known)

    def __len__(self) -> int:
        return len(self._table)

    def place(self, number: int) -> str:
        """Say which row it is, counted from 1."""
        return f"row {number + 1}"

    def read(self, number: int) -> Row:
        """Return a row."""
        return Row(without_nulls(dict(self._table[number])))


def open_hub(repo: str, revision: str | None, subset: str, split: str) -> HubRows:
    """Download one split of a data set, or find it in the cache; HubError if neither works."""
    try:
        import datasets
    except ImportError:
        raise MissingDependencyError(
            "is not a local path, and datasets on the Hub need the package datasets, which is not "
            "installed",
            path=repo,
            hint="run: pip install 'loraformat[data]'",
        ) from None
    try:
        table = datasets.load_dataset(repo, subset or None, split=split, revision=revision)
    except Exception as error:  # HTTP, offline, cache, builder and parser errors of several trees
        words = " ".join(str(error).split())[:300]
        raise HubError(
            f"is not a local path and cannot be loaded from the Hub as a dataset: {words}",
            path=repo,
            hint="check the id, the split and the subset",
        ) from error
    return HubRows(repo, table)
