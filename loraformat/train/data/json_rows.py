"""Rows that are JSON objects somewhere in a file."""

from __future__ import annotations

from abc import ABC, abstractmethod

from loraformat.train.data.file_rows import FileRows
from loraformat.train.data.row import LONGEST_ROW, BadRowError, Row, parse_object

__all__ = ["JsonRows"]


class JsonRows(FileRows, ABC):
    """Objects that are parsed when they are read. One that is too long is known by its length."""

    @abstractmethod
    def place(self, number: int) -> str:
        """Say where the object stands."""

    def read(self, number: int) -> Row:
        """Return an object.

        Raises
        ------
        BadRowError
            If it is longer than `LONGEST_ROW` bytes, or is no strict JSON object.
        """
        place = self.place(number)
        if self._lengths[number] > LONGEST_ROW:
            raise BadRowError(place, f"longer than {LONGEST_ROW} bytes", path=self.name)
        return Row(parse_object(self._bytes(number), place, self.name))
