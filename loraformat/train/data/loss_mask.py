"""From ranges of characters to tokens: which are learned, and what each stands for."""

from __future__ import annotations

from collections.abc import Container
from itertools import accumulate

import numpy as np

from loraformat.train.data.tokenizer import TokenizedText

__all__ = [
    "Ranges",
    "forget_space_behind_ends",
    "last_learned",
    "overlapping",
    "straddling",
    "texts",
]

Ranges = tuple[tuple[int, int], ...]
"""Characters from … to before …, in order."""


def overlapping(tokens: TokenizedText, ranges: Ranges) -> list[bool]:
    """Tell for each token whether one of its characters is in a range.

    Examples
    --------
    >>> overlapping(TokenizedText("ab cd", [1, 2, 3], [(0, 2), (2, 4), (4, 5)]), ((3, 5),))
    [False, True, True]
    """
    begins, ends = np.array(tokens.spans, dtype=np.int64).reshape(-1, 2).T
    learned = np.zeros(len(begins), dtype=bool)
    for begin, stop in ranges:
        learned |= np.minimum(ends, stop) > np.maximum(begins, begin)
    return learned.tolist()


def straddling(tokens: TokenizedText, ranges: Ranges) -> int:
    """Count the tokens that stand for characters on both sides of where a range begins.

    A tokenizer may leave the space before a word out of the word's span
    (``trim_offsets``); what no other token stands for is counted as this one's.
    """
    begins = _ends_before(tokens)
    ends = [end for _, end in tokens.spans]
    where = np.searchsorted(ends, [begin for begin, _ in ranges], side="right")
    return sum(
        index < len(ends) and begins[index] < begin
        for index, (begin, _) in zip(where.tolist(), ranges, strict=True)
    )


def forget_space_behind_ends(
    learned: list[bool], tokens: TokenizedText, ranges: Ranges, special: Container[int]
) -> None:
    """Unlearn the white space with which a range ends behind a special token."""
    begins = [begin for begin, _ in tokens.spans]
    for _, stop in ranges:
        place = int(np.searchsorted(begins, stop)) - 1
        space = []
        while place >= 0 and learned[place] and tokens.ids[place] not in special:
            begin, end = tokens.spans[place]
            if tokens.text[begin:end].strip():
                break
            space.append(place)
            place -= 1
        if place >= 0 and tokens.ids[place] in special:
            for one in space:
                learned[one] = False


def last_learned(learned: list[bool], tokens: TokenizedText, ranges: Ranges) -> list[int]:
    r"""Return for each range the last token in it that is learned and no white space.

    Examples
    --------
    >>> tokens = TokenizedText("a b\n", [1, 2, 3], [(0, 1), (1, 3), (3, 4)])
    >>> last_learned([True, True, True], tokens, ((0, 1), (1, 4)))
    [0, 1]
    """
    begins = [begin for begin, _ in tokens.spans]
    found = []
    for start, stop in ranges:
        place = int(np.searchsorted(begins, stop)) - 1
        while place >= 0 and tokens.spans[place][1] > start:
            begin, end = tokens.spans[place]
            if learned[place] and tokens.text[begin:end].strip():
                found.append(place)
                break
            place -= 1
    return found


def texts(tokens: TokenizedText) -> list[str]:
    """Return the text of each token: what stands between its end and the end of the one before.

    Examples
    --------
    >>> texts(TokenizedText("ab cd", [1, 2], [(0, 2), (3, 5)]))
    ['ab', ' cd']
    """
    begins = _ends_before(tokens)
    return [tokens.text[begin:end] for begin, (_, end) in zip(begins, tokens.spans, strict=False)]


def _ends_before(tokens: TokenizedText) -> list[int]:
    return [0, *accumulate((end for _, end in tokens.spans), max)]
