"""Long documents in pieces that are tokenized one at a time.

A piece ends behind a line end, else before a space, else between two characters, so that
tokens across the cut are rare. Documents of up to 64 KiB are never cut here.
"""

from __future__ import annotations

from collections.abc import Iterator

__all__ = ["LONGEST_PIECE", "cut", "pieces"]

LONGEST_PIECE = 1 << 16
"""Most bytes of a piece."""


def cut(window: bytes) -> int:
    r"""Return where to cut UTF-8 that goes on behind the window.

    Parameters
    ----------
    window : bytes
        At least four.

    Returns
    -------
    int
        Bytes before the cut; more than 0.

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


def pieces(data: bytes, longest: int = LONGEST_PIECE) -> Iterator[bytes]:
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
