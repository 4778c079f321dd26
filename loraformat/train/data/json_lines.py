"""JSON Lines: one object per line, found by its byte offset."""

from __future__ import annotations

from array import array
from collections.abc import Iterator

from loraformat.train.data.data_file import DataFile
from loraformat.train.data.row import LONGEST_ROW, BadRowError, Row, parse_object

__all__ = ["JsonLines"]


class JsonLines:
    """The lines of a file that are not blank; 16 bytes of memory each.

    Parameters
    ----------
    file : DataFile
    unit : str
        What a line is called in messages.
    """

    def __init__(self, file: DataFile, unit: str = "line") -> None:
        self._file = file
        self._unit = unit
        self._begins, self._lengths, self._numbers = array("q"), array("I"), array("I")
        for begin, length, number in _lines(file):
            self._begins.append(begin)
            self._lengths.append(length)
            self._numbers.append(number)

    @property
    def name(self) -> str:
        """The path."""
        return str(self._file.path)

    def __len__(self) -> int:
        return len(self._begins)

    def place(self, number: int) -> str:
        """Say which line it is, counted from 1."""
        return f"{self._unit} {self._numbers[number]}"

    def read(self, number: int) -> Row:
        """Return the object on a line.

        Raises
        ------
        BadRowError
            If it is too long, or is no strict JSON object.
        """
        begin, length = self._begins[number], self._lengths[number]
        if length > LONGEST_ROW:
            raise BadRowError(
                self.place(number), f"longer than {LONGEST_ROW} bytes", path=self.name
            )
        data = self._file.between(begin, begin + length)
        return Row(parse_object(data, self.place(number), self.name))


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
