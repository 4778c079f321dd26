"""The one pass over all rows before training: an index of the samples, and statistics of the data.

Rows that cannot be trained on are refused here. The index takes 20 bytes of memory per sample.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from loraformat.errors import InputError
from loraformat.train.data.encode import Encoded, RowEncoder
from loraformat.train.data.options import DataOptions
from loraformat.train.data.row import BadRowError, RowSource
from loraformat.train.data.row_formats import KindError, kind_of

__all__ = ["DatasetScan", "DatasetStats", "Sample", "SampleIndex"]

_BAD_ROWS_SHOWN = 5


class DatasetScan:
    """One pass over all rows of some sources: their `index` of samples, and an `audit`.

    `fingerprint` is a hash of all tokens and loss masks, `stops` the special tokens with which
    target turns end. `row_hashes` (uint64) has a number for each row with samples, equal for equal
    tokens and loss masks.

    Raises
    ------
    InputError
        If a row is bad and ``options.bad_rows`` is not ``"skip"``, or the whole is
        nothing to train on.
    """

    def __init__(
        self,
        sources: Sequence[RowSource],
        encoder: RowEncoder,
        options: DataOptions,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self.index, self.audit = SampleIndex(sources), DatasetStats()
        self._sources = sources
        self._encoder, self._options = encoder, options
        self._hash = sha256()
        self.stops: set[int] = set()
        self.row_hashes = array("Q")
        total = sum(map(len, sources))
        for number, source in enumerate(sources):
            self.audit.sources.append((source.name, len(source)))
            self._kind = ""
            for row in range(len(source)):
                self._survey_row(number, source, row)
                self.audit.rows += 1
                if self.audit.rows % 256 == 0:
                    progress(self.audit.rows, total)
        progress(total, total)
        self.audit.refuse_if_useless(options)
        self.fingerprint = self._hash.hexdigest()

    def _survey_row(self, number: int, source: RowSource, row: int) -> None:
        self._row = sha256()
        samples = self.audit.samples
        try:
            # What is wrong with a row shows before its first part; the parts of a long text
            # are never all in memory.
            for part, one in enumerate(self._parts(source, row)):
                self.audit.rewritten += part == 1 and not one.is_text
                self.audit.straddling += one.straddling
                self.audit.endless += not one.ends
                self.audit.wordless += one.wordless
                for what in one.unwritten:
                    self.audit.unwritten[what] = self.audit.unwritten.get(what, 0) + 1
                for sample in self._samples(one, Sample(number, row, part, 0, len(one.ids))):
                    self._add(one, sample)
        except BadRowError as error:
            if self._options.bad_rows != "skip":
                raise
            self.audit.count_bad(error)
        if self.audit.samples > samples:
            self.row_hashes.append(int.from_bytes(self._row.digest()[:8], "little"))

    def _parts(self, source: RowSource, number: int) -> Iterator[Encoded]:
        row = source.read(number)
        try:
            kind = kind_of(row.fields)
            self._kind = self._kind or kind
            if kind != self._kind:
                raise KindError(
                    f"a row of {kind} in a file of {self._kind}; one file holds one kind"
                )
            yield from self._encoder.encode(row)
        except KindError as error:
            raise BadRowError(source.place(number), str(error), path=source.name) from None

    def _samples(self, one: Encoded, whole: Sample) -> Iterator[Sample]:
        limit, audit = self._options.seq_len, self.audit
        lead = one.lead_within(limit)
        if one.is_text:
            audit.longest = max(audit.longest, min(whole.length, limit))
            yield from _cut(whole, limit, lead, overlap=0)
            return
        audit.longest = max(audit.longest, whole.length)
        if whole.length <= limit:
            yield whole
            return
        audit.over_length += 1
        if self._options.over_length in ("refuse", "drop"):
            audit.dropped += 1
            source = self._sources[whole.source]
            audit.first_over_length = (
                audit.first_over_length or f"{source.name}: {source.place(whole.row)}"
            )
            return
        if self._options.over_length == "split":
            # Each begins with the last token of the one before, so that every token but the very
            # first has one before it in just one sample: each is learned once.
            parts = list(_cut(whole, limit, lead, overlap=1))
            audit.split += 1
            audit.parts += len(parts)
            yield from parts
            return
        at_start = self._options.over_length == "truncate-start"
        kept = limit - lead if at_start else limit
        audit.truncated += 1
        audit.cut += whole.length - kept - (lead if at_start else 0)
        yield replace(whole, begin=whole.length - kept if at_start else 0, length=limit)

    def _add(self, one: Encoded, sample: Sample) -> None:
        piece = one.piece(sample.begin, sample.length, one.lead_within(self._options.seq_len))
        trained = sum(piece.learned)
        if trained == 0:
            self.audit.unlearned += 1
            return
        self.index.append(sample)
        self.audit.samples += 1
        self.audit.tokens += sample.length
        self.audit.trained += trained
        self.audit.pieces += one.is_text
        self.audit.rendered += one.rendered
        self.audit.all_learned += not one.is_text and all(one.learned[1:])
        self.stops.update(one.stops)
        for digest in (self._hash, self._row):
            digest.update(np.array([sample.length], "<i8").tobytes())
            digest.update(np.array(piece.ids, "<i8").tobytes())
            digest.update(np.array(piece.learned, "u1").tobytes())


def _cut(whole: Sample, limit: int, lead: int, *, overlap: int) -> Iterator[Sample]:
    """Yield samples of so many tokens, of which the later ones begin with the same few."""
    begin = 0
    while begin < max(whole.length - overlap, 1):
        repeated = lead if begin else 0
        length = min(limit, whole.length - begin + repeated)
        yield replace(whole, begin=begin, length=length)
        begin += length - repeated - overlap


@dataclass(slots=True)
class DatasetStats:
    """Counts over one pass of all rows."""

    sources: list[tuple[str, int]] = field(default_factory=list)  #: name and rows of each
    rows: int = 0
    bad: int = 0  #: rows skipped because they cannot be read
    bad_examples: list[str] = field(default_factory=list)  #: what is wrong with the first five
    samples: int = 0  #: what is trained on
    tokens: int = 0
    trained: int = 0  #: target tokens
    pieces: int = 0  #: samples that are text, cut to ``seq_len``; these are learned whole
    rendered: int = 0  #: samples that the chat template wrote
    unlearned: int = 0  #: samples left out: no token of them is learned
    all_learned: int = 0  #: conversations and completions without any prompt
    over_length: int = 0  #: conversations and completions longer than ``seq_len``
    longest: int = 0  #: tokens of the longest of all samples
    first_over_length: str = ""  #: where the first of those over length stands
    dropped: int = 0  #: over-length samples left out
    truncated: int = 0  #: over-length samples cut
    cut: int = 0  #: tokens cut off these
    split: int = 0  #: over-length samples split
    parts: int = 0  #: into how many, those included that are `unlearned`
    rewritten: int = 0  #: conversations of a sample per turn: the template rewrites old turns
    straddling: int = 0  #: target tokens that also stand for the end of a prompt
    endless: int = 0  #: samples that end without a special token: nothing teaches to stop
    wordless: int = 0  #: answers without a word, which are not learned
    unwritten: dict[str, int] = field(default_factory=dict)
    """What rows say and the chat template does not write, and how often."""

    def count_bad(self, problem: object) -> None:
        """Count a row that is skipped."""
        self.bad += 1
        if len(self.bad_examples) < _BAD_ROWS_SHOWN:
            self.bad_examples.append(str(problem))

    def lines(self) -> list[str]:
        """Say what is in the data, and what was done to it, in sentences for people.

        Examples
        --------
        >>> DatasetStats(rows=2, samples=2, tokens=10, trained=4, longest=6).lines()
        ['2 rows, 2 samples, 10 tokens, 4 of them learned (40.0 %), longest sample 6']
        """
        share = 100 * self.trained / max(self.tokens, 1)
        said = [
            f"{self.rows} rows, {self.samples} samples, {self.tokens} tokens, "
            f"{self.trained} of them learned ({share:.1f} %), longest sample {self.longest}"
        ]
        notes = (
            (self.bad, "bad rows skipped"),
            (self.dropped, "samples longer than seq-len dropped"),
            (self.truncated, f"samples longer than seq-len truncated, {self.cut} tokens cut off"),
            (self.split, f"samples longer than seq-len split into {self.parts}"),
            (self.unlearned, "samples left out: no token of them is learned"),
            (self.wordless, "empty answers are excluded from the loss"),
            (self.all_learned, "samples without a prompt: every token of them is learned"),
            (self.rewritten, "conversations became one sample per assistant turn: "
             "the chat template rewrites earlier turns"),
            (self.straddling, "target tokens also contain the end of a prompt: does it end in a "
                              "space that belongs to the completion?"),
            (self.endless, "samples end without an end-of-turn token: "
             "the model does not learn from them to stop"),
        )  # fmt: skip
        said += [f"{count} {what}" for count, what in notes if count]
        said += [
            f"{count} {what} left out: the chat template does not write them"
            for what, count in sorted(self.unwritten.items())
        ]
        return said + [f"skipped: {problem}" for problem in self.bad_examples]

    def refuse_if_useless(self, options: DataOptions) -> None:
        """Refuse data that cannot be trained on.

        There are no rows, samples are too long and that was not provided for, nothing is learned,
        or no sample of a data set of answers has a question.
        """
        path = self.sources[0][0] if len(self.sources) == 1 else None
        if self.rows == 0:
            raise InputError("holds no rows" if path else "the data hold no rows", path=path)
        if self.over_length and options.over_length == "refuse":
            raise InputError(
                f"{self.over_length} samples are longer than {options.seq_len} tokens, the "
                f"longest {self.longest}; the first is {self.first_over_length}",
                path=path,
                hint=f"allow for them with --seq-len {self.longest}, or choose what to do with "
                "them: --over-length drop, split, truncate (the end is cut off) or "
                "truncate-start",
            )
        if self.trained == 0:
            raise InputError(
                f"no token to learn in {self.rows} rows: {self.bad} bad rows, {self.dropped} "
                f"samples dropped, {self.unlearned} without a completion or an assistant's turn",
                path=path,
                hint="check the fields and roles, or learn everything with --train-on all",
            )
        answers = self.samples - self.pieces
        if options.train_on == "completions" and answers and self.all_learned == answers:
            raise InputError(
                f"every token of all {answers} samples would be learned: no sample has a prompt",
                path=path,
                hint='write {"text": …} rows, or say that this is meant with --train-on all',
            )


@dataclass(frozen=True, slots=True)
class Sample:
    """Where a sample comes from: source, row, part of its text or turn, and which tokens of it."""

    source: int
    row: int
    part: int
    begin: int
    length: int


class SampleIndex:
    """All samples of some sources."""

    def __init__(self, sources: Sequence[RowSource]) -> None:
        self._first_rows = [0, *accumulate(map(len, sources))]
        self._rows = array("q")
        self._parts, self._begins, self._lengths = array("I"), array("I"), array("I")

    def append(self, sample: Sample) -> None:
        """Add a sample at the end."""
        self._rows.append(self._first_rows[sample.source] + sample.row)
        self._parts.append(sample.part)
        self._begins.append(sample.begin)
        self._lengths.append(sample.length)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> Sample:
        row = self._rows[number]
        source = bisect_right(self._first_rows, row) - 1
        return Sample(
            source, row - self._first_rows[source],
            self._parts[number], self._begins[number], self._lengths[number],
        )  # fmt: skip

    def lengths(self) -> npt.NDArray[np.uint32]:
        """Return the tokens of each sample, uint32 ``[samples]``."""
        return np.array(self._lengths, dtype=np.uint32)
