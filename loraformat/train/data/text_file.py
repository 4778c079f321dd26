"""Plain text: a file is one document, or one per paragraph, read in pieces."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import BinaryIO

from loraformat.train.data.data_file import DataFile
from loraformat.train.data.file_rows import FileRows
from loraformat.train.data.pieces import cut
from loraformat.train.data.row import BadRowError, Row

__all__ = ["TextFile"]

_BEGINS, _ENDS = 1, 2
_LINE_PART = 1 << 16


class TextFile(FileRows):
    """The pieces of a text file; 13 bytes of memory each.

    Parameters
    ----------
    file : DataFile
        UTF-8.
    paragraphs : bool
        What stands between blank lines is a document, without the line end behind it.
        Otherwise the whole file is one, byte for byte.
    longest : int
        Most bytes of a piece.
    """

    def __init__(self, file: DataFile, *, paragraphs: bool, longest: int) -> None:
        super().__init__(file)
        self._longest = longest
        self._flags = array("B")
        whole = ((file.text_begin(), file.nbytes),)
        with file.opened() as stream:
            for begin, end in _paragraphs(file) if paragraphs else whole:
                self._index(stream, begin, end)

    def _index(self, stream: BinaryIO, begin: int, end: int) -> None:
        flags = _BEGINS
        while begin < end:
            stop = end
            if end - begin > self._longest:
                stream.seek(begin)
                stop = begin + cut(stream.read(self._longest))
            self._put(begin, stop - begin)
            self._flags.append(flags | (_ENDS if stop == end else 0))
            begin, flags = stop, 0

    def place(self, number: int) -> str:
        """Say at which byte the piece begins."""
        return f"byte {self._begins[number]}"

    def read(self, number: int) -> Row:
        """Return a piece as ``{"text": …}``.

        Raises
        ------
        BadRowError
            If it is not UTF-8.
        """
        try:
            text = self._bytes(number).decode("utf-8")
        except UnicodeDecodeError as error:
            raise BadRowError(
                f"byte {self._begins[number] + error.start}", "not UTF-8 text", path=self.name
            ) from None
        flags = self._flags[number]
        return Row({"text": text}, bool(flags & _BEGINS), bool(flags & _ENDS))


def _paragraphs(file: DataFile) -> Iterator[tuple[int, int]]:
    offset = file.text_begin()
    with file.opened() as stream:
        stream.seek(offset)
        begin = end = offset
        at_line_start = True
        while line := stream.readline(_LINE_PART):
            if at_line_start and line.isspace():
                if end > begin:
                    yield begin, end
                begin = end = offset + len(line)
            else:
                end = offset + len(line.rstrip(b"\r\n"))
            at_line_start = line.endswith(b"\n")
            offset += len(line)
        if end > begin:
            yield begin, end
