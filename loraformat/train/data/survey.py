"""The one pass over all rows before training: tokenize, judge, count, index."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from hashlib import sha256

import numpy as np

from loraformat.train.data.audit import Audit
from loraformat.train.data.encode import Encoded, RowEncoder
from loraformat.train.data.index import Sample, SampleIndex
from loraformat.train.data.kinds import KindError, kind_of
from loraformat.train.data.options import DataOptions
from loraformat.train.data.row import BadRowError, RowSource

__all__ = ["Survey"]


class Survey:
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
    audit : Audit
    fingerprint : str
        Hash of all tokens and of what is learned of them.

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
        self.index, self.audit = SampleIndex(sources), Audit()
        self._sources = sources
        self._encoder, self._options = encoder, options
        self._hash = sha256()
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
        try:
            # What is wrong with a row shows before its first part; the parts of a long text
            # are never all in memory.
            for part, one in enumerate(self._parts(source, row)):
                self.audit.rewritten += part == 1 and not one.is_text
                self.audit.straddling += one.straddling
                self.audit.endless += not one.ends
                for sample in self._samples(one, Sample(number, row, part, 0, len(one.ids))):
                    self._add(one, sample)
        except BadRowError as error:
            if self._options.bad_rows != "skip":
                raise
            self.audit.count_bad(error)

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
        if one.is_text:
            audit.longest = max(audit.longest, min(whole.length, limit))
            for begin in range(0, whole.length, limit):
                yield replace(whole, begin=begin, length=min(limit, whole.length - begin))
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
            parts = list(_split(whole, limit))
            audit.split += 1
            audit.parts += len(parts)
            yield from parts
            return
        audit.truncated += 1
        audit.cut += whole.length - limit
        at_start = self._options.over_length == "truncate-start"
        yield replace(whole, begin=whole.length - limit if at_start else 0, length=limit)

    def _add(self, one: Encoded, sample: Sample) -> None:
        end = sample.begin + sample.length
        trained = sum(one.learned[sample.begin + 1 : end])
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
        self._hash.update(np.array([sample.length], "<i8").tobytes())
        self._hash.update(np.array(one.ids[sample.begin : end], "<i8").tobytes())
        self._hash.update(np.array(one.learned[sample.begin : end], "u1").tobytes())


def _split(whole: Sample, limit: int) -> Iterator[Sample]:
    """Yield samples of so many tokens; each begins with the last token of the one before.

    So every token but the very first has one before it in just one sample: each is learned once.
    """
    for begin in range(0, whole.length - 1, limit - 1):
        yield replace(whole, begin=begin, length=min(limit, whole.length - begin))
