"""Rows of CSV and TSV files with a header, found by byte offset; quotes may hold line ends."""

from __future__ import annotations

import csv
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

from loraformat.errors import InputError
from loraformat.train.data.row import LONGEST_ROW, BadRowError, DataFile, FileRows, Row

__all__ = ["CsvRows"]


@contextmanager
def _long_fields() -> Iterator[None]:
    # The limit is the interpreter's, 128 KiB by default: less than a document.
    before = csv.field_size_limit(LONGEST_ROW)
    try:
        yield
    finally:
        csv.field_size_limit(before)


class _Lines:
    """Lines of a stream as text, with the count of bytes and lines handed out."""

    def __init__(self, stream: BinaryIO, path: str, begin: int) -> None:
        self._stream, self._path = stream, path
        self.offset, self.number = begin, 0
        self._record_begin = begin
        stream.seek(begin)

    def begin_record(self) -> tuple[int, int]:
        self._record_begin = self.offset
        return self.offset, self.number + 1

    def __iter__(self) -> Iterator[str]:
        while line := self._stream.readline(LONGEST_ROW + 1):
            self.number += 1
            self.offset += len(line)
            if self.offset - self._record_begin > LONGEST_ROW:
                raise InputError(
                    f"line {self.number}: a record of more than {LONGEST_ROW} bytes; "
                    "is a quote open?",
                    path=self._path,
                )
            # Bytes that are not UTF-8 are found when the record is read.
            yield line.decode("utf-8", "replace")


class CsvRows(FileRows):
    """The records of a file under its header; 16 bytes of memory each.

    Raises
    ------
    InputError
        If there is no header, a name occurs twice in it, or a quote does not close.
    """

    def __init__(self, file: DataFile, delimiter: str) -> None:
        super().__init__(file)
        self._delimiter = delimiter
        self._numbers = array("I")
        self._header: list[str] = []
        with file.opened() as stream, _long_fields():
            lines = _Lines(stream, self.name, file.text_begin())
            reader = csv.reader(lines, delimiter=delimiter, strict=True)
            begin, number = lines.begin_record()
            try:
                for record in reader:
                    if not self._header:
                        self._header = self._checked_header(record)
                    elif record:
                        self._put(begin, lines.offset - begin)
                        self._numbers.append(number)
                    begin, number = lines.begin_record()
            except csv.Error as error:
                raise InputError(f"line {number}: not CSV: {error}", path=self.name) from None

    def _checked_header(self, names: list[str]) -> list[str]:
        if not names or len(set(names)) != len(names):
            raise InputError(
                "line 1: wanted a header with a different name for each column", path=self.name
            )
        return names

    def place(self, number: int) -> str:
        """Say on which line the record begins, counted from 1."""
        return f"line {self._numbers[number]}"

    def read(self, number: int) -> Row:
        """Return a record, by column; it must be UTF-8 and have as many fields as the header."""
        place = self.place(number)
        try:
            text = self._bytes(number).decode("utf-8")
        except UnicodeDecodeError as error:
            raise BadRowError(
                place, f"not UTF-8 at byte {self._begins[number] + error.start}", path=self.name
            ) from None
        with _long_fields():
            record = next(csv.reader(_split(text), delimiter=self._delimiter, strict=True))
        if len(record) != len(self._header):
            raise BadRowError(
                place,
                f"{len(record)} fields, wanted the {len(self._header)} of the header",
                path=self.name,
            )
        return Row(dict(zip(self._header, record, strict=True)))


def _split(text: str) -> list[str]:
    # As the index was made: str.splitlines would split at U+2028, too.
    return [line + "\n" for line in text.removesuffix("\n").split("\n")]
