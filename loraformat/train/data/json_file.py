"""Rows of JSON files: JSON Lines, an array of objects, or an object with an array under ``"data"``.

Lines are found by their line ends. The elements of an array are found by their brackets and quotes
alone, on a mapping of the file. Each row is parsed when it is read.
"""

from __future__ import annotations

import mmap
import re
from array import array
from itertools import count

from loraformat.errors import InputError
from loraformat.train.data.row import (
    LONGEST_ROW,
    BadRowError,
    DataFile,
    FileRows,
    Row,
    RowSource,
    parse_object,
)

__all__ = ["JsonArray", "JsonLines", "JsonRows", "open_json"]

_MEMBER = b'"data"'
_STRUCTURE = re.compile(rb'["\[\]{}]')
_SCALAR_END = re.compile(rb"[\s,\]}]")
_SPACE = re.compile(rb"[ \t\r\n]*")


class JsonRows(FileRows):
    """JSON objects that are parsed when they are read."""

    def read(self, number: int) -> Row:
        """Return an object; it must be strict JSON of at most `LONGEST_ROW` bytes."""
        place = self.place(number)
        if self._lengths[number] > LONGEST_ROW:
            raise BadRowError(place, f"longer than {LONGEST_ROW} bytes", path=self.name)
        return Row(parse_object(self._bytes(number), place, self.name))


class JsonLines(JsonRows):
    """The lines of a file that are not blank, called `unit`; 16 bytes of memory each."""

    def __init__(self, file: DataFile, unit: str = "line") -> None:
        super().__init__(file)
        self._unit = unit
        self._numbers = array("I")
        offset = file.text_begin()
        with file.opened() as stream:
            stream.seek(offset)
            for number in count(1):
                if not (line := stream.readline(LONGEST_ROW + 1)):
                    break
                if not line.isspace():
                    self._put(offset, len(line))
                    self._numbers.append(number)
                offset += len(line)
                while line and not line.endswith(b"\n"):  # the rest of a line that is too long
                    line = stream.readline(LONGEST_ROW)
                    offset += len(line)

    def place(self, number: int) -> str:
        """Say which line it is, counted from 1."""
        return f"{self._unit} {self._numbers[number]}"


class JsonArray(JsonRows):
    """The elements of an array; 12 bytes of memory each."""

    def __init__(self, file: DataFile, scan: _Scan, begin: int) -> None:
        super().__init__(file)
        position = scan.skip_space(begin + 1)
        while scan.byte(position) != b"]":
            end = scan.value_end(position)
            self._put(position, min(end - position, LONGEST_ROW + 1))
            position = scan.after_comma(end, b"]")

    def place(self, number: int) -> str:
        """Return the element's number, counted from 1, and its byte offset."""
        return f"element {number + 1} (byte {self._begins[number]})"


class _Scan:
    """Finds where values end, without looking into them."""

    def __init__(self, data: mmap.mmap, path: str) -> None:
        self._data, self._path = data, path

    def byte(self, position: int) -> bytes:
        return self._data[position : position + 1]

    def skip_space(self, position: int) -> int:
        match = _SPACE.match(self._data, position)
        return match.end() if match else position

    def string_end(self, begin: int) -> int:
        quote = begin
        while (quote := self._data.find(b'"', quote + 1)) >= 0:
            before = quote
            while self._data[before - 1 : before] == b"\\":
                before -= 1
            if (quote - before) % 2 == 0:
                return quote + 1
        raise self.broken(begin, "a string that does not end")

    def value_end(self, begin: int) -> int:
        head = self.byte(begin)
        if head == b'"':
            return self.string_end(begin)
        if head not in (b"[", b"{"):
            match = _SCALAR_END.search(self._data, begin)
            if match is None or match.start() == begin:
                raise self.broken(begin, "no value where one was wanted")
            return match.start()
        depth, position = 0, begin
        while (match := _STRUCTURE.search(self._data, position)) is not None:
            position = match.end()
            if match[0] == b'"':
                position = self.string_end(match.start())
                continue
            depth += 1 if match[0] in b"[{" else -1
            if depth == 0:
                return position
        raise self.broken(begin, "brackets that do not close")

    def after_comma(self, end: int, closing: bytes) -> int:
        position = self.skip_space(end)
        head = self.byte(position)
        if head == b",":
            position = self.skip_space(position + 1)
            if self.byte(position) == closing:
                raise self.broken(position, "a comma before the end")
        elif head != closing:
            raise self.broken(position, f"no comma, and no {closing.decode()}")
        return position

    def broken(self, position: int, problem: str) -> InputError:
        return InputError(f"not JSON: {problem} (byte {position})", path=self._path)


def _member(scan: _Scan, begin: int) -> int | None:
    """Return where the array under "data" begins in the object that begins there."""
    position = scan.skip_space(begin + 1)
    while scan.byte(position) != b"}":
        if scan.byte(position) != b'"':
            raise scan.broken(position, "no key where one was wanted")
        end = scan.string_end(position)
        key = scan._data[position:end]
        colon = scan.skip_space(end)
        if scan.byte(colon) != b":":
            raise scan.broken(colon, "no colon behind a key")
        value = scan.skip_space(colon + 1)
        if key == _MEMBER and scan.byte(value) == b"[":
            return value
        position = scan.after_comma(scan.value_end(value), b"}")
    return None


def open_json(file: DataFile) -> RowSource:
    """Open a JSON file: an array, an object with ``"data"``, or JSON Lines of that name.

    Raises
    ------
    InputError
        If it is something else, or brackets and quotes do not match.
    """
    begin = file.text_begin()
    if file.nbytes == begin:
        return JsonLines(file)
    with file.opened() as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        scan = _Scan(data, str(file.path))
        begin = scan.skip_space(begin)
        if scan.byte(begin) == b"[":
            return JsonArray(file, scan, begin)
        if scan.byte(begin) != b"{":
            raise scan.broken(begin, "neither an array nor an object")
        member = _member(scan, begin)
        if member is not None:
            return JsonArray(file, scan, member)
        end = scan.value_end(begin)
        if b"\n" not in data[begin : min(end, begin + LONGEST_ROW)]:
            return JsonLines(file)  # objects line by line are often called .json
    raise InputError(
        'an object without an array under "data"',
        path=file.path,
        hint="write one object per line, or an array of objects",
    )
