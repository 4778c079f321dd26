"""Merging pieces: when a list of merges and a score per piece cut every text alike.

BPE of ``tokenizer.json`` has a list of merges: of all neighbours that are a pair of the list,
those of the lowest rank are joined, the leftmost first. llama.cpp's SentencePiece has no such
list: any two neighbours are joined that together are a token, those of the token with the
highest score first. The two are the same if

* every pair that makes a token out of pieces that merging can build is in the list, and
* all pairs that make one token have ranks next to each other, so that the token has a place
  in the order of all tokens.

A tokenizer that was trained by SentencePiece has both by construction. There is one exception
in the wild: tokens of equal score, runs of spaces and line ends in Gemma's vocabulary, whose
pairs lie between each other. Runs of one character meet nothing but themselves, so that the
two rules are simply played on runs of every length.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from loraformat.errors import UnsupportedError, printable

__all__ = ["MAX_PIECE", "Pair", "order_of", "splits"]

Pair = tuple[str, str]

MAX_PIECE = 512  # characters; a piece has as many splits, each as long
_LONGEST_RUN = 64  # of a token whose pairs lie between those of others


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
    for text in sorted(texts, key=len):
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


def order_of(
    merges: Iterable[Pair], texts: Collection[str], never: Collection[str] = ()
) -> list[str]:
    """Return all pieces that merging builds, in the order in which SentencePiece builds them.

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
        If no order gives the same tokens in every text.

    Examples
    --------
    >>> order_of([("b", "c"), ("a", "b"), ("ab", "c"), ("a", "bc")], {"ab", "bc", "abc"})
    ['bc', 'ab', 'abc']
    >>> order_of([("b", "c"), ("a", "b"), ("ab", "c")], {"ab", "bc", "abc"})
    Traceback (most recent call last):
    loraformat.errors.UnsupportedError: ...merges a and bc into abc, and tokenizer.json does not
    """
    wanted = {pair: text for text, pairs in splits(texts, never).items() for pair in pairs}
    spans: dict[str, _Span] = {}
    ranks: dict[Pair, int] = {}
    for rank, pair in enumerate(merges):
        if pair in wanted and pair not in ranks:
            ranks[pair] = rank
            spans.setdefault(wanted[pair], _Span(wanted[pair], rank, rank)).last = rank
    for pair in wanted.keys() - ranks.keys():
        raise UnsupportedError(
            f"llama.cpp's SentencePiece merges {printable(pair[0])} and {printable(pair[1])} into "
            f"{printable(wanted[pair])}, and tokenizer.json does not"
        )
    order: list[str] = []
    for group in _groups(sorted(spans.values(), key=lambda span: span.first)):
        order += [group[0].text] if len(group) == 1 else _runs(group, ranks)
    return order


@dataclass(slots=True)
class _Span:
    """The lowest and the highest rank of the pairs that make a text."""

    text: str
    first: int
    last: int


def _groups(spans: Sequence[_Span]) -> list[list[_Span]]:
    """Put those together that lie between each other."""
    groups: list[list[_Span]] = []
    end = -1
    for span in spans:
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


def _runs(group: list[_Span], ranks: dict[Pair, int]) -> list[str]:
    """Find the order of tokens whose pairs lie between each other."""
    mixed = next((span for span in group if len(set(span.text)) > 1), None)
    if mixed is None and all(len(span.text) <= _LONGEST_RUN for span in group):
        for key in _ORDERS:
            order = [span.text for span in sorted(group, key=key)]
            if all(_same_runs(mark, order, ranks) for mark in {text[0] for text in order}):
                return order
    one = mixed or group[0]
    other = next(span for span in group if span is not one)
    raise UnsupportedError(
        f"tokenizer.json merges into {printable(one.text)} now before and now after it merges into "
        f"{printable(other.text)}, and llama.cpp's SentencePiece always in the same order"
    )


def _same_runs(mark: str, order: list[str], ranks: dict[Pair, int]) -> bool:
    """Play both rules on runs of a character up to twice as long as the longest token."""
    by_rank = {
        (len(left), len(right)): rank
        for (left, right), rank in ranks.items()
        if left[0] == right[0] == mark and len({*left, *right}) == 1
    }
    first: dict[int, int] = {}
    for pair, rank in by_rank.items():
        first[sum(pair)] = min(rank, first.get(sum(pair), rank))
    place = {len(text): number for number, text in enumerate(order) if text[0] == mark}
    edge = min(first[size] for size in place)
    by_place = {  # tokens outside the group keep their side of it
        pair: (1, place[size]) if size in place else (2 * (first[size] > edge), first[size])
        for pair in by_rank
        for size in [sum(pair)]
    }
    longest = max(sum(pair) for pair in by_rank)
    return longest <= _LONGEST_RUN and all(
        _merged(count, by_rank) == _merged(count, by_place) for count in range(2, 2 * longest + 2)
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
