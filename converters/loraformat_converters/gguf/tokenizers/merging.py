"""Equivalence of BPE merges and SentencePiece scores.

BPE of ``tokenizer.json`` has a list of merges: of all neighbours that are a pair of the list,
those of the lowest rank are joined, the leftmost first. llama.cpp's SentencePiece has no such
list: any two neighbours are joined that together are a token, those of the token with the
highest score first. The two are the same if

* every pair that makes a token out of pieces that merging can build is in the list, and
* all pairs that make one token have ranks next to each other, so that the token has a place
  in the order of all tokens.

A tokenizer that was trained by SentencePiece has both by construction, but for one case in the
wild: tokens of equal score, runs of spaces and line ends mostly, whose pairs lie between each
other. Runs of one character meet nothing but themselves, so that the two rules are simply played
on runs of every length, and an order is looked for in which they end alike.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from loraformat.errors import UnsupportedError, printable

__all__ = ["MAX_PIECE", "Order", "Pair", "order_of", "splits"]

Pair = tuple[str, str]

MAX_PIECE = 256  # characters; a piece has as many splits, each as long
_LONGEST_RUN = 65  # that the rules are played on


@dataclass(frozen=True, slots=True)
class Order:
    """In which order pieces are built.

    Attributes
    ----------
    texts : list of str
        All that merging builds, first ones first.
    unsure : list of str
        Those of them that some texts may get where ``tokenizer.json`` gives others.
    """

    texts: list[str]
    unsure: list[str]


def splits(texts: Collection[str], never: Collection[str] = ()) -> dict[str, list[Pair]]:
    """Return the pairs of pieces that make each text, of those that merging can build at all.

    Parameters
    ----------
    texts : collection of str
        The vocabulary.
    never : collection of str
        Single characters that never meet another piece.

    Returns
    -------
    dict of str to list of Pair
        Shortest texts first; of each, the pair with the longest left half first. Single
        characters are always there and have no pairs.

    Raises
    ------
    UnsupportedError
        If a text is too long to be a piece.

    Examples
    --------
    >>> splits({"a", "b", "c", "ab", "abc", "xbcd"})
    {'ab': [('a', 'b')], 'abc': [('ab', 'c')]}
    """
    found: dict[str, list[Pair]] = {}
    for text in sorted(texts, key=lambda one: (len(one), one)):
        size = len(text)
        if size > MAX_PIECE:
            raise UnsupportedError(
                f"the token {printable(text)} has {size} characters, more than {MAX_PIECE}"
            )
        pairs = []
        for at in range(size - 1, 0, -1):
            left, right = text[:at], text[at:]
            if (left in found if at > 1 else left not in never) and (
                right in found if at < size - 1 else right not in never
            ):
                pairs.append((left, right))
        if pairs:
            found[text] = pairs
    return found


def order_of(merges: Iterable[Pair], texts: Collection[str], never: Collection[str] = ()) -> Order:
    """Return the pieces that merging builds, in the order in which SentencePiece builds them.

    Parameters
    ----------
    merges : iterable of Pair
        By rank.
    texts : collection of str
        The vocabulary, without tokens that are cut out of a text before it is merged.
    never : collection of str
        Single characters that are cut out.

    Raises
    ------
    UnsupportedError
        If SentencePiece merges what is not in the list.

    Examples
    --------
    >>> order_of([("b", "c"), ("a", "b"), ("ab", "c"), ("a", "bc")], {"ab", "bc", "abc"}).texts
    ['bc', 'ab', 'abc']
    >>> order_of([("b", "c"), ("a", "b"), ("ab", "c")], {"ab", "bc", "abc"})
    Traceback (most recent call last):
    loraformat.errors.UnsupportedError: ...merges a and bc into abc, and tokenizer.json does not
    """
    wanted = {pair: text for text, pairs in splits(texts, never).items() for pair in pairs}
    ranks: dict[Pair, int] = {}
    for rank, pair in enumerate(merges):
        if pair in wanted:
            ranks.setdefault(pair, rank)
    for pair, text in wanted.items():
        if pair not in ranks:
            raise UnsupportedError(
                f"llama.cpp's SentencePiece merges {printable(pair[0])} and {printable(pair[1])} "
                f"into {printable(text)}, and tokenizer.json does not"
            )
    runs = _Runs(ranks)
    order: list[str] = []
    unsure: list[str] = []
    for group in _groups(ranks):
        found = [span.text for span in group]
        if len(group) > 1 and all(len(set(text)) == 1 for text in found):
            found = runs.order(group)
        elif len(group) > 1:
            unsure += found
        order += found
    return Order(order, unsure + runs.otherwise(order))


@dataclass(slots=True)
class _Span:
    """The lowest and the highest rank of the pairs that make a text."""

    text: str
    first: int
    last: int


def _groups(ranks: Mapping[Pair, int]) -> list[list[_Span]]:
    """Put the texts together whose pairs lie between each other."""
    spans: dict[str, _Span] = {}
    for (left, right), rank in ranks.items():  # by rank
        spans.setdefault(left + right, _Span(left + right, rank, rank)).last = rank
    groups: list[list[_Span]] = []
    end = -1
    for span in spans.values():
        if span.first > end:
            groups.append([])
        groups[-1].append(span)
        end = max(end, span.last)
    return groups


_ORDERS: tuple[Callable[[_Span], int], ...] = (
    lambda span: span.first,
    lambda span: span.last,
    lambda span: -len(span.text),
    lambda span: len(span.text),
)


class _Runs:
    """Plays both rules on runs of one character.

    Parameters
    ----------
    ranks : mapping of Pair to int
    """

    def __init__(self, ranks: Mapping[Pair, int]) -> None:
        self._by_rank: dict[str, dict[tuple[int, int], int]] = {}
        for (left, right), rank in ranks.items():
            mark = left[0]
            if left + right == mark * (size := len(left + right)):
                self._by_rank.setdefault(mark, {})[len(left), size - len(left)] = rank

    def order(self, group: list[_Span]) -> list[str]:
        """Return the order of tokens whose pairs lie between each other."""
        order: list[str] = []
        for key in _ORDERS:
            order = [span.text for span in sorted(group, key=key)]
            if all(self._same(mark, self._places(mark, order)) for mark in {t[0] for t in order}):
                break
        return order

    def otherwise(self, order: list[str]) -> list[str]:
        """Return the longest run of each character that is not merged alike in this order."""
        places: dict[str, dict[int, int]] = {mark: {} for mark in self._by_rank}
        for number, text in enumerate(order):
            if text[0] in places and text == text[0] * len(text):
                places[text[0]][len(text)] = number
        return [mark * max(of) for mark, of in places.items() if not self._same(mark, of)]

    def _places(self, mark: str, order: list[str]) -> dict[int, tuple[int, int]]:
        """Return the order of runs by length; tokens outside the group keep their side of it."""
        first: dict[int, int] = {}
        for pair, rank in self._by_rank[mark].items():
            first[sum(pair)] = min(rank, first.get(sum(pair), rank))
        place = {len(text): number for number, text in enumerate(order) if text[0] == mark}
        edge = min(first[size] for size in place)
        return {
            size: (1, place[size]) if size in place else (2 * (rank > edge), rank)
            for size, rank in first.items()
        }

    def _same(self, mark: str, places: Mapping[int, Any]) -> bool:
        """Play up to twice the length of the longest token."""
        by_rank = self._by_rank[mark]
        by_place = {pair: places[sum(pair)] for pair in by_rank}
        longest = min(2 * max(places) + 1, _LONGEST_RUN)
        return all(
            _merged(count, by_rank) == _merged(count, by_place) for count in range(3, longest + 1)
        )


def _merged(count: int, ranks: Mapping[tuple[int, int], Any]) -> list[int]:
    parts = [1] * count
    while True:
        best = min(
            ((ranks[pair], at) for at, pair in enumerate(pairwise(parts)) if pair in ranks),
            default=None,
        )
        if best is None:
            return parts
        parts[best[1] : best[1] + 2] = [parts[best[1]] + parts[best[1] + 1]]
