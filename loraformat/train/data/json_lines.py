"""JSON Lines: one object per line, found by its byte offset."""

from __future__ import annotations

from array import array
from collections.abc import Iterator

from loraformat.train.data.data_file import DataFile
from loraformat.train.data.json_rows import JsonRows
from loraformat.train.data.row import LONGEST_ROW

__all__ = ["JsonLines"]


class JsonLines(JsonRows):
    """The lines of a file that are not blank; 16 bytes of memory each.

    Parameters
    ----------
    file : DataFile
    unit : str
        What a line is called in messages.
    """

    def __init__(self, file: DataFile, unit: str = "line") -> None:
        super().__init__(file)
        self._unit = unit
        self._numbers = array("I")
        for begin, length, number in _lines(file):
            self._put(begin, length)
            self._numbers.append(number)

    def place(self, number: int) -> str:
        """Say which line it is, counted from 1."""
        return f"{self._unit} {self._numbers[number]}"


def _lines(file: DataFile) -> Iterator[tuple[int, int, int]]:
    """Yield where each line begins, its length, and its number; a too long one is cut short."""
    offset = file.text_begin()
    with file.opened() as stream:
        stream.seek(offset)
        number = 0
        while line := stream.readline(LONGEST_ROW + 1):
            number += 1
            if not line.isspace():
                yield offset, len(line), number
            offset += len(line)
            while line and not line.endswith(b"\n"):  # the rest of a line that is too long
                line = stream.readline(LONGEST_ROW)
                offset += len(line)
