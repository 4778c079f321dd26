"""Token ids and loss mask of a row.

A token is trained if it stands for at least one trained character, so that every character of a
completion counts; one that also stands for the end of the prompt is counted by
`Encoded.straddling`. What ends a completion is trained, too: EOS, or the template's end of turn,
but not the white space that a template writes behind that.

Nothing here knows the id of padding: a batch is padded later, by length.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Container, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, groupby

import numpy as np

from loraformat.train.data.chat import ChatRenderer
from loraformat.train.data.row import Row
from loraformat.train.data.row_formats import Completion, Conversation, meaning
from loraformat.train.data.text_file import pieces
from loraformat.train.data.tokenizer import TextEncoder, TokenizedText

__all__ = ["Encoded", "Ranges", "RowEncoder", "marked", "overlapping", "straddling", "texts"]

Ranges = tuple[tuple[int, int], ...]
"""Characters from … to before …, in order."""


@dataclass(slots=True)
class Encoded:
    """Tokens of one sample, or of a piece of text that becomes several."""

    ids: list[int]
    learned: list[bool]  #: whether each is a target
    shown: list[str]  #: the text of each, with EOS and BOS by name
    ends: bool  #: with a special token, from which the model learns to stop
    straddling: int = 0  #: target tokens that also stand for characters of a prompt
    is_text: bool = False  #: it may be cut into pieces of ``seq_len``
    rendered: bool = False  #: the chat template wrote it
    lead: int = 0  #: tokens with which each later piece of it begins, too, such as BOS
    stops: tuple[int, ...] = ()  #: special tokens with which target turns end
    unwritten: tuple[str, ...] = ()
    """What the row says and the chat template leaves out; of the row's first part only."""
    wordless: int = 0  #: empty answers, which are no targets; of the row's first part only

    def lead_within(self, limit: int) -> int:
        """Return how many tokens begin each later piece of at most so many tokens."""
        return self.lead if limit > self.lead + 1 else 0

    def piece(self, begin: int, length: int, lead: int) -> Encoded:
        """Return a piece of so many tokens, those among them that begin each later one.

        The token behind these has its context in another piece, and is not learned.
        """
        lead = lead if begin else 0
        end = begin + length - lead
        learned = self.learned[:lead] + self.learned[begin:end]
        learned[: lead + 1] = [False] * min(lead + 1, len(learned))
        return replace(
            self, ids=self.ids[:lead] + self.ids[begin:end], learned=learned,
            shown=self.shown[:lead] + self.shown[begin:end],
        )  # fmt: skip


class RowEncoder:
    """Encodes rows with one tokenizer; prompts are targets, too, if `everything` is.

    Text is tokenized in pieces of at most `longest_piece` bytes.
    """

    def __init__(self, encoder: TextEncoder, *, everything: bool, longest_piece: int) -> None:
        self._encoder = encoder
        self._everything, self._longest_piece = everything, longest_piece

    @cached_property
    def chat(self) -> ChatRenderer:
        """Made for the first conversation: others need none of its trials."""
        return ChatRenderer(self._encoder)

    def encode(self, row: Row) -> Iterator[Encoded]:
        """Yield what a row consists of: pieces of its text, its conversation or its turns.

        KindError says that it means nothing, or that the chat template rejects it.
        """
        meant = meaning(row.fields)
        if isinstance(meant, str):
            parts = self._text_parts(meant)
            yield from (self._piece(row, parts, number) for number in range(len(parts)))
        elif isinstance(meant, Completion):
            yield self._completion(meant)
        else:
            yield from self._conversation(meant)

    def encode_part(self, row: Row, number: int) -> Encoded:
        """Return one of those, without tokenizing the other pieces of a long text."""
        meant = meaning(row.fields)
        if isinstance(meant, str):
            return self._piece(row, self._text_parts(meant), number)
        return list(self.encode(row))[number]

    def prompt_format(self, row: Row) -> str | None:
        """Return how a row like this becomes text, with braces for its own; None of plain text."""
        meant = meaning(row.fields)
        if isinstance(meant, str):
            return None
        return "{prompt}{completion}" if isinstance(meant, Completion) else self.chat.shape()

    def _text_parts(self, text: str) -> list[bytes]:
        return list(pieces(text.encode("utf-8"), self._longest_piece))

    def _piece(self, row: Row, parts: list[bytes], number: int) -> Encoded:
        tokens = self._encoder.tokenize(parts[number].decode("utf-8"))
        begins = row.begins and number == 0
        ends = row.ends and number == len(parts) - 1
        piece = self._framed(tokens, [True] * len(tokens.ids), ends=ends)
        piece.is_text = True
        if not begins and piece.lead < len(piece.ids):
            piece.learned[piece.lead] = False  # its context is in the piece before
        if begins and ends and not tokens.ids:  # no document, and no end of one
            piece.learned = [False] * len(piece.ids)
        return piece

    def _completion(self, meant: Completion) -> Encoded:
        tokens = self._encoder.tokenize(meant.prompt + meant.completion)
        begin = 0 if self._everything else len(meant.prompt)
        ranges = ((begin, len(tokens.text)),)
        learned = overlapping(tokens, ranges)
        encoded = self._framed(tokens, learned, ends=True)
        encoded.straddling = straddling(tokens, ranges)
        if not meant.completion:
            encoded.wordless = 1
            if not self._everything:
                encoded.learned = [False] * len(encoded.ids)
        return encoded

    def _conversation(self, meant: Conversation) -> Iterator[Encoded]:
        wordless = meant.wordless
        special = self._encoder.special
        for rendered in self.chat.render(meant, everything=self._everything):
            tokens = self._encoder.tokenize(rendered.text)
            learned = overlapping(tokens, rendered.learned)
            if not self._everything:
                _forget_space_behind_ends(learned, tokens, rendered.learned, special)
            last = _last_learned(learned, tokens, rendered.learned)
            stops = [tokens.ids[n] for n in last if tokens.ids[n] in special]
            yield Encoded(
                tokens.ids, learned, texts(tokens), len(stops) == len(last),
                straddling(tokens, rendered.learned), rendered=True,
                lead=self._lead(tokens.ids),
                stops=tuple(stops), unwritten=rendered.unwritten, wordless=wordless,
            )  # fmt: skip
            wordless = 0

    def _framed(self, tokens: TokenizedText, learned: list[bool], *, ends: bool) -> Encoded:
        prefix, suffix = self._encoder.prefix, self._encoder.suffix
        # A text may spell out BOS or EOS itself; twice would be what no model has seen.
        before = prefix if tokens.ids[: len(prefix)] != prefix else []
        after = suffix if ends and (not tokens.ids or tokens.ids[-1:] != suffix[-1:]) else []
        names = self._encoder.tokenizer.convert_ids_to_tokens
        ids = before + tokens.ids + after
        return Encoded(
            ids,
            [self._everything] * len(before) + learned + [True] * len(after),
            [*names(before), *texts(tokens), *names(after)],
            ends=bool(suffix) or not ends,
            lead=self._lead(ids),
            stops=tuple(suffix[-1:]) if ends else (),
        )

    def _lead(self, ids: list[int]) -> int:
        """Return how many tokens at the beginning are those that begin every text."""
        first = self._encoder.tokenizer.bos_token_id
        for start in (self._encoder.prefix, [] if first is None else [first]):
            if start and ids[: len(start)] == start:
                return len(start)
        return 0


def marked(encoded: Encoded) -> str:
    """Return the text of some tokens, runs of target tokens between ⟦ and ⟧.

    The first token has nothing before it and is not learned. The text is as it stands in the data;
    who prints it, escapes control characters.

    Examples
    --------
    >>> sample = Encoded([1, 2, 3], [False, True, True], ["Say ", "hello", "</s>"], True)
    >>> marked(sample)
    'Say ⟦hello</s>⟧'
    """
    learned = [False, *encoded.learned[1:]]
    said = []
    for yes, run in groupby(zip(learned, encoded.shown, strict=True), lambda x: x[0]):
        text = "".join(shown for _, shown in run)
        said.append(f"⟦{text}⟧" if yes else text)
    return "".join(said)


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
    """Count the tokens with characters on both sides of the start of a range.

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


def _forget_space_behind_ends(
    learned: list[bool], tokens: TokenizedText, ranges: Ranges, special: Container[int]
) -> None:
    """Unlearn the white space with which a range ends behind a special token."""
    for _, stop in ranges:
        space: list[int] = []
        for place in _back_from(stop, tokens):
            if tokens.ids[place] in special:
                for one in space:
                    learned[one] = False
                break
            if not learned[place] or _has_words(tokens, place):
                break
            space.append(place)


def _last_learned(learned: list[bool], tokens: TokenizedText, ranges: Ranges) -> list[int]:
    """Return for each range its last target token that is not white space."""
    found = []
    for start, stop in ranges:
        for place in _back_from(stop, tokens):
            if tokens.spans[place][1] <= start:
                break
            if learned[place] and _has_words(tokens, place):
                found.append(place)
                break
    return found


def _back_from(stop: int, tokens: TokenizedText) -> range:
    """Return the tokens that begin before a character, the last one first."""
    return range(bisect_left(tokens.spans, (stop, 0)) - 1, -1, -1)


def _has_words(tokens: TokenizedText, place: int) -> bool:
    begin, end = tokens.spans[place]
    return bool(tokens.text[begin:end].strip())


def texts(tokens: TokenizedText) -> list[str]:
    """Return the text of each token, from the end of the previous one to its own.

    Examples
    --------
    >>> texts(TokenizedText("ab cd", [1, 2], [(0, 2), (3, 5)]))
    ['ab', ' cd']
    """
    begins = _ends_before(tokens)
    return [tokens.text[begin:end] for begin, (_, end) in zip(begins, tokens.spans, strict=False)]


def _ends_before(tokens: TokenizedText) -> list[int]:
    return [0, *accumulate((end for _, end in tokens.spans), max)]
