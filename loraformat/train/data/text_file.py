"""Rows of plain text: a file is one document, or one per paragraph, read in pieces.

A piece ends behind a line end, else before a space, else between two characters, so that tokens
across the cut are rare. It is as long as some eight samples: a shuffled epoch comes back to it for
each of them, and tokenizes it anew. A document that fits into one sample is never cut.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import BinaryIO

from loraformat.train.data.row import BadRowError, DataFile, FileRows, Row

__all__ = ["TextFile", "cut", "piece_size", "pieces"]

_BEGINS, _ENDS = 1, 2
_LINE_PART = 1 << 16

_BYTES_PER_TOKEN = 32  # eight samples at the usual four bytes per token
_SMALLEST, _LARGEST = 1 << 12, 1 << 20


class TextFile(FileRows):
    """The pieces, of at most `longest` bytes, of a UTF-8 file; 13 bytes of memory each.

    With `paragraphs`, what stands between blank lines is a document, without the line end behind
    it. Otherwise the whole file is one, byte for byte.
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
        """Return a piece as ``{"text": …}``; it must be UTF-8."""
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


def piece_size(seq_len: int) -> int:
    """Return the most bytes of a piece.

    Examples
    --------
    >>> piece_size(512)
    16384
    """
    return min(max(seq_len * _BYTES_PER_TOKEN, _SMALLEST), _LARGEST)


def cut(window: bytes) -> int:
    r"""Return where to cut UTF-8 text that continues beyond a window of at least four bytes.

    The result is the bytes before the cut, more than 0.

    Examples
    --------
    >>> cut(b"one line\nand mo"), cut(b"two words"), cut("ééé".encode()[:-1])
    (9, 3, 4)
    """
    line = window.rfind(b"\n") + 1
    if line:
        return line
    space = window.rfind(b" ")
    if space > 0:
        return space
    end = len(window)
    while end > 1 and end > len(window) - 4:
        end -= 1
        if window[end] & 0xC0 != 0x80:  # the last character may be incomplete: leave it
            return end
    return len(window)  # not UTF-8, which is found when it is read


def pieces(data: bytes, longest: int) -> Iterator[bytes]:
    r"""Yield a text in pieces; together they are the text.

    Examples
    --------
    >>> list(pieces(b"a\nb c\nd", longest=4))
    [b'a\n', b'b c\n', b'd']
    """
    begin = 0
    while len(data) - begin > longest:
        end = begin + cut(data[begin : begin + longest])
        yield data[begin:end]
        begin = end
    yield data[begin:]
