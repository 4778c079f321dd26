"""A row of a data set, a source of rows, and the error for a bad row."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from os import PathLike
from typing import Any, Protocol

from loraformat.errors import InputError
from loraformat.storage import strict_json
from loraformat.train.data.data_file import DataFile

__all__ = ["LONGEST_ROW", "BadRowError", "FileRows", "Row", "RowSource", "parse_object"]

LONGEST_ROW = 16 << 20
"""Most bytes of a row."""


class BadRowError(InputError):
    """A row cannot be read; ``bad_rows="skip"`` counts it and goes on.

    Parameters
    ----------
    place : str
        Where in the file, such as ``"line 7"``.
    problem : str
        What is wrong and what was wanted.
    path : str or os.PathLike
    hint : str, optional

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
    """What stands in one row.

    Attributes
    ----------
    fields : dict
        Of any shape; `loraformat.train.data.row_formats` says what it means.
    begins, ends : bool
        Whether text is the beginning, and the end, of its document.
    """

    fields: dict[str, Any]
    begins: bool = True
    ends: bool = True


class RowSource(Protocol):
    """A file, or a data set, of which any row can be read at any time."""

    @property
    def name(self) -> str:
        """For messages: the path, or the id on the Hub."""

    def __len__(self) -> int: ...

    def read(self, number: int) -> Row:
        """Return a row, counted from 0, or raise `BadRowError`."""

    def place(self, number: int) -> str:
        """Say where the row stands, such as ``line 7``."""


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


class FileRows:
    """Where the rows of a file lie; 12 bytes of memory each.

    What a row is, and where it stands in a reader's eyes, is said by the kinds of files that are
    made from this, which are `loraformat.train.data.row.RowSource`.

    Parameters
    ----------
    file : DataFile
    """

    def __init__(self, file: DataFile) -> None:
        self._file = file
        self._begins, self._lengths = array("q"), array("I")

    @property
    def name(self) -> str:
        """The path."""
        return str(self._file.path)

    def __len__(self) -> int:
        return len(self._begins)

    def _put(self, begin: int, length: int) -> None:
        """Add a row of so many bytes behind those that are known."""
        self._begins.append(begin)
        self._lengths.append(length)

    def _bytes(self, number: int) -> bytes:
        """Read what lies in a row's range, counted from 0."""
        begin = self._begins[number]
        return self._file.between(begin, begin + self._lengths[number])
