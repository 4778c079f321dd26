"""Rows of a data set, sources of rows, and the files that they are read from.

Every read checks that the file is still what was indexed. A few dozen files stay open;
others are opened for each read, so that a directory of a hundred thousand files needs no
hundred thousand descriptors.
"""

from __future__ import annotations

import os
import weakref
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import IO, Any, BinaryIO, Protocol

from loraformat.errors import FileChangedError, InputError
from loraformat.storage import strict_json
from loraformat.storage.safe_directory import SafeDirectory

__all__ = ["LONGEST_ROW", "BadRowError", "DataFile", "FileRows", "Row", "RowSource", "parse_object"]

LONGEST_ROW = 16 << 20
"""Most bytes of a row."""

_MOST_KEPT_OPEN = 64
_KEPT_OPEN: set[int] = set()
_FOREIGN_MARKS = (b"\xff\xfe", b"\xfe\xff")
_UTF8_MARK = b"\xef\xbb\xbf"


class DataFile:
    """One file of training data, opened only inside its directory.

    `path` is shown in messages; `open_descriptor` opens it for reading.
    """

    def __init__(self, path: Path, open_descriptor: Callable[[], int]) -> None:
        self.path = path
        self._open_descriptor = open_descriptor
        self._kept: int | None = None
        descriptor = open_descriptor()
        self._identity = _identity(descriptor)
        self.nbytes = self._identity[0]
        if len(_KEPT_OPEN) < _MOST_KEPT_OPEN:
            self._kept = descriptor
            _KEPT_OPEN.add(descriptor)
            weakref.finalize(self, _close, descriptor)
        else:
            os.close(descriptor)

    @classmethod
    def at(cls, path: Path) -> DataFile:
        """Open a file that the user named, through links or not."""
        real = Path(os.path.realpath(path))
        return cls(path, lambda: SafeDirectory(real.parent).open(real.name))

    @classmethod
    def inside(cls, folder: SafeDirectory, name: str) -> DataFile:
        """Open a file of a directory; a link that leads out of it is refused."""
        return cls(folder.path / name, lambda: folder.open(name))

    @classmethod
    def spooled(cls, path: Path, file: IO[bytes]) -> DataFile:
        """Open a temporary file without a name; ``path`` is where its rows came from."""
        return cls(path, lambda: _reopened(file))

    @contextmanager
    def opened(self) -> Iterator[BinaryIO]:
        """Open the file at its beginning; FileChangedError if it is not what it was any more."""
        with self._reading(), os.fdopen(self._open_descriptor(), "rb") as file:
            self._check(file.fileno())
            yield file

    def between(self, begin: int, end: int) -> bytes:
        """Return a range of bytes, of a file that is checked as by `opened`."""
        if self._kept is None:
            with self.opened() as file:
                data = os.pread(file.fileno(), end - begin, begin)
        else:
            with self._reading():
                self._check(self._kept)
                data = os.pread(self._kept, end - begin, begin)
        if len(data) != end - begin:
            raise FileChangedError("became shorter while it was being read", path=self.path)
        return data

    def _check(self, descriptor: int) -> None:
        if _identity(descriptor) != self._identity:
            raise FileChangedError("changed while it was being trained on", path=self.path)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(f"cannot be read: {error.strerror}", path=self.path) from None

    def text_begin(self) -> int:
        """Return where UTF-8 text begins: behind a byte-order mark, if there is one.

        A file that says that it is UTF-16 or UTF-32, or is compressed, is refused.
        """
        head = self.between(0, min(4, self.nbytes))
        if head[:2] in _FOREIGN_MARKS:
            raise InputError(
                "is text in UTF-16 or UTF-32, wanted UTF-8",
                path=self.path,
                hint="convert it: iconv -f UTF-16 -t UTF-8",
            )
        if head[:2] == b"\x1f\x8b" or head == b"\x28\xb5\x2f\xfd":
            raise InputError(
                "is compressed, and its name does not say so",
                path=self.path,
                hint=f"name it {self.path.name}.{'gz' if head[:1] == bytes([31]) else 'zst'}",
            )
        return len(_UTF8_MARK) if head.startswith(_UTF8_MARK) else 0


def _identity(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_size, status.st_mtime_ns


def _close(descriptor: int) -> None:
    _KEPT_OPEN.discard(descriptor)
    os.close(descriptor)


def _reopened(file: IO[bytes]) -> int:
    descriptor = os.dup(file.fileno())
    os.lseek(descriptor, 0, os.SEEK_SET)  # shared with the original, which nobody reads
    return descriptor


class BadRowError(InputError):
    """A row cannot be read; with ``bad_rows="skip"`` it is counted and skipped.

    Examples
    --------
    >>> str(BadRowError("line 7", "holds no text", path="a.jsonl"))
    'a.jsonl: line 7: holds no text'
    """

    def __init__(
        self, place: str, problem: str, *, path: str | PathLike[str], hint: str | None = None
    ) -> None:
        super().__init__(f"{place}: {problem}", path=path, hint=hint)


@dataclass(frozen=True, slots=True)
class Row:
    """The fields of one row, and whether text is the beginning, and the end, of its document.

    The fields are of any shape; `loraformat.train.data.row_formats` says what they mean.
    """

    fields: dict[str, Any]
    begins: bool = True
    ends: bool = True


class RowSource(Protocol):
    """A file, or a data set, of which any row can be read at any time.

    Its `name`, the path or the id on the Hub, is for messages.
    """

    name: str

    def __len__(self) -> int: ...

    def read(self, number: int) -> Row:
        """Return a row, counted from 0, or raise `BadRowError`."""

    def place(self, number: int) -> str:
        """Return the row's location, such as ``line 7``."""


def parse_object(data: bytes, place: str, path: str) -> dict[str, Any]:
    """Return the JSON object that a row is.

    Raises
    ------
    BadRowError
        If it is not strict JSON, or no object.

    Examples
    --------
    >>> parse_object(b'{"text": "a"}', "line 1", "a.jsonl")
    {'text': 'a'}
    """
    try:
        fields = strict_json.loads(data)
    except strict_json.StrictJsonError as error:
        raise BadRowError(place, f"not strict JSON: {error}", path=path) from None
    if not isinstance(fields, dict):
        raise BadRowError(place, "is JSON, but not an object {…}", path=path)
    return fields


class FileRows(RowSource):
    """The byte ranges of a file's rows; 12 bytes of memory each.

    What a row is, and where it stands in a reader's eyes, is said by the kinds of files that are
    made from this.
    """

    def __init__(self, file: DataFile) -> None:
        self._file, self.name = file, str(file.path)
        self._begins, self._lengths = array("q"), array("I")

    def __len__(self) -> int:
        return len(self._begins)

    def _put(self, begin: int, length: int) -> None:
        """Add a row of so many bytes behind those that are known."""
        self._begins.append(begin)
        self._lengths.append(length)

    def _bytes(self, number: int) -> bytes:
        """Read the bytes of a row, counted from 0."""
        begin = self._begins[number]
        return self._file.between(begin, begin + self._lengths[number])
