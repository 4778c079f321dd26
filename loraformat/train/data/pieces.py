"""Long documents in pieces that are tokenized one at a time.

A piece ends behind a line end, else before a space, else between two characters, so that
tokens across the cut are rare. It is as long as some eight samples: a shuffled epoch comes
back to it for each of them, and tokenizes it anew. What fits into one sample is never cut.
"""

from __future__ import annotations

from collections.abc import Iterator

__all__ = ["cut", "piece_size", "pieces"]

_BYTES_PER_TOKEN = 32  # eight samples at the usual four bytes per token
_SMALLEST, _LARGEST = 1 << 12, 1 << 20


def piece_size(seq_len: int) -> int:
    """Return the most bytes of a piece.

    Examples
    --------
    >>> piece_size(512)
    16384
    """
    return min(max(seq_len * _BYTES_PER_TOKEN, _SMALLEST), _LARGEST)


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
