"""Rows that are ranges of a file's bytes, found by where each begins."""

from __future__ import annotations

from array import array

from loraformat.train.data.data_file import DataFile

__all__ = ["FileRows"]


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
