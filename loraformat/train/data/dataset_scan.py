"""The one pass over all rows before training: tokenize, judge, count, index."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from hashlib import sha256

import numpy as np

from loraformat.train.data.dataset_stats import DatasetStats
from loraformat.train.data.encode import Encoded, RowEncoder
from loraformat.train.data.field_types import KindError
from loraformat.train.data.options import DataOptions
from loraformat.train.data.row import BadRowError, RowSource
from loraformat.train.data.row_formats import kind_of
from loraformat.train.data.sample_index import Sample, SampleIndex

__all__ = ["DatasetScan"]


class DatasetScan:
    """Index and audit of some sources.

    Parameters
    ----------
    sources : sequence of RowSource
    encoder : RowEncoder
    options : DataOptions
    progress : callable
        Called with the rows done and the rows in total.

    Attributes
    ----------
    index : SampleIndex
    audit : DatasetStats
    fingerprint : str
        Hash of all tokens and of what is learned of them.
    stops : set of int
        Special tokens with which what is learned ends.
    row_hashes : array of uint64
        One number for each row with samples, the same for the same tokens, learned alike.

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
