"""Training data, scanned and ready: batches from any point of any epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from hashlib import sha256
from os import PathLike
from typing import Any

from loraformat.errors import FileChangedError, InputError, LoraFormatError
from loraformat.train.batch import IGNORED, Batch
from loraformat.train.data.batch_plan import BatchPlan, DataPosition, Rows, collate, prefetch
from loraformat.train.data.dataset_scan import DatasetScan
from loraformat.train.data.encode import Encoded, RowEncoder, marked
from loraformat.train.data.options import DataOptions
from loraformat.train.data.row import RowSource
from loraformat.train.data.row_formats import KindError
from loraformat.train.data.row_sources import open_sources
from loraformat.train.data.text_file import piece_size
from loraformat.train.data.tokenizer import TextEncoder, open_tokenizer

__all__ = ["Dataset", "open_data"]


class Dataset:
    """What `open_data` returns.

    Attributes
    ----------
    audit : DatasetStats
        What is in the data; `DatasetStats.lines` is for people.
    options : DataOptions
    fingerprint : str
        Of tokens, masks, options and the number of ranks: what a cursor must agree with.
    stops : list of int
        The special tokens with which what is learned ends: where a trained model stops.
    """

    def __init__(
        self, sources: Sequence[RowSource], text_encoder: TextEncoder, options: DataOptions,
        *, rank: int, world: int, progress: Callable[[int, int], None],
    ) -> None:  # fmt: skip
        self.options = options
        self._sources, self._rank, self._world = sources, rank, world
        self._text_encoder = text_encoder
        self._encoder = RowEncoder(
            text_encoder,
            everything=options.train_on == "all",
            longest_piece=piece_size(options.seq_len),
        )
        survey = DatasetScan(sources, self._encoder, options, progress)
        self.audit, self._index = survey.audit, survey.index
        self.stops: list[int] = sorted(survey.stops)
        self._row_hashes = survey.row_hashes
        self._plan = BatchPlan(self._index.lengths(), options)
        self._counts: dict[int, int] = {}
        self._last: tuple[tuple[int, int, int], Encoded] | None = None
        order = (
            options.seq_len, options.batch_size, options.packing, options.shuffle, options.seed,
            world, survey.fingerprint,
        )  # fmt: skip
        self.fingerprint = sha256(repr(order).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._index)

    def batches_in(self, epoch: int) -> int:
        """Return how many batches an epoch has for each rank, the same for all of them."""
        if epoch not in self._counts:
            total = sum(1 for _ in self._plan.batches(epoch))
            self._counts[epoch] = -(-total // self._world)
        return self._counts[epoch]

    def batches(
        self, start: DataPosition | None = None, *, epochs: int | None = None
    ) -> Iterator[tuple[Batch, DataPosition]]:
        """Yield this rank's batches, each with the cursor of what is left behind it.

        `epochs` is counted from the first, also where `start` is in a later one.

        Raises
        ------
        InputError
            If the cursor is one of other data, of other options, or of another number of ranks.
        FileChangedError
            If a file was changed since it was scanned.

        Notes
        -----
        Rank r of w takes batches r, r + w, r + 2w, … of one global order. Where an epoch's
        batches do not go round, the ranks without one get the epoch's first batch without labels
        (``batch.trained`` is 0), so that all take the same number of steps.
        """
        start = start or DataPosition()
        if start.data not in ("", self.fingerprint):
            raise InputError(
                "the data, their order or the number of ranks are not those of the cursor",
                hint="continue with the same files, tokenizer, options and ranks, or start again",
            )
        if start.batch > self.batches_in(start.epoch):
            raise InputError(f"the cursor is behind the end of epoch {start.epoch}")
        return prefetch(self._batches(start, epochs))

    def _batches(
        self, start: DataPosition, epochs: int | None
    ) -> Iterator[tuple[Batch, DataPosition]]:
        epoch, skipped = start.epoch, start.batch
        while epochs is None or epoch < epochs:
            count = self.batches_in(epoch)
            for number, (rows, learned) in enumerate(self._shares(epoch)):
                if number >= skipped:
                    after = (epoch, number + 1) if number + 1 < count else (epoch + 1, 0)
                    yield self._batch(rows, learned), DataPosition(*after, self.fingerprint)
            epoch, skipped = epoch + 1, 0

    def _shares(self, epoch: int) -> Iterator[tuple[Rows, bool]]:
        """Yield the rows of this rank's batches, and whether they have target tokens."""
        first: Rows = []
        number = -1
        for number, rows in enumerate(self._plan.batches(epoch)):
            first = first or rows
            if number % self._world == self._rank:
                yield rows, True
        if 0 <= number % self._world < self._rank:
            yield first, False

    def _batch(self, rows: Rows, learned: bool) -> Batch:
        batch = collate(rows, self._encoded, self._text_encoder.padding)
        if not learned:
            batch.labels.fill_(IGNORED)
        return batch

    def _encoded(self, number: int) -> Encoded:
        sample = self._index[number]
        source = self._sources[sample.source]
        part = (sample.source, sample.row, sample.part)
        last = self._last  # neighbours in a text share a part
        if last is not None and last[0] == part:
            encoded = last[1]
        else:
            encoded = self._encoder.encode_part(source.read(sample.row), sample.part)
            self._last = (part, encoded)
        piece = encoded.piece(
            sample.begin, sample.length, encoded.lead_within(self.options.seq_len)
        )
        if len(piece.ids) < sample.length:
            raise FileChangedError(
                f"{source.place(sample.row)}: fewer tokens than when it was surveyed",
                path=source.name,
            )
        return piece

    def rows_also_in(self, other: Dataset) -> int:
        """Count the rows that are also in other data: those of equal tokens and loss masks."""
        there = set(other._row_hashes)
        return sum(one in there for one in self._row_hashes)

    def place(self, number: int) -> str:
        """Return the location of a sample of ``batch.samples``, such as ``data.jsonl: line 7``."""
        sample = self._index[number]
        source = self._sources[sample.source]
        return f"{source.name}: {source.place(sample.row)}"

    def prompt_format(self) -> str | None:
        """Return how the first row becomes text, or None of plain text, or if it is unreadable."""
        sample = self._index[0]
        try:
            return self._encoder.prompt_format(self._sources[sample.source].read(sample.row))
        except (KindError, LoraFormatError):
            return None

    def chat(self) -> dict[str, Any] | None:
        """Return for a record how conversations in the data are written and where turns end.

        None if no chat template wrote any of the samples.
        """
        if not self.audit.rendered:
            return None
        pieces = self._encoder.chat.format()
        return {
            "format": pieces and asdict(pieces),
            "stops": self._text_encoder.tokenizer.convert_ids_to_tokens(self.stops),
            "stop_ids": self.stops,
        }

    def preview(self, number: int = 0) -> str:
        """Return a sample as text, its target tokens between ⟦ and ⟧."""
        return marked(self._encoded(number))


def open_data(
    data: str | PathLike[str] | Sequence[str | PathLike[str]],
    tokenizer: str | PathLike[str] | Any,
    options: DataOptions | None = None,
    *,
    rank: int = 0,
    world: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Dataset:
    """Open data for training, and scan every row once.

    Parameters
    ----------
    data : path, Hub id, or sequence of them
        A file named .jsonl, .json, .csv, .tsv, .parquet or .txt; a directory of those; an id
        of the form ``org/name[@revision]``.
    tokenizer : str, os.PathLike or transformers.PreTrainedTokenizerBase
        A model's directory, or a tokenizer.
    options : DataOptions, optional
    rank, world : int
        This process among how many.
    progress : callable
        Called with the rows done and the rows in total.

    Raises
    ------
    InputError
        If something is missing or damaged, or has no target token.
    UsageError
        If a subset or a split is asked for, and all that is named is files.
    MissingDependencyError
        If an optional package is needed and not installed.
    """
    options = options or DataOptions()
    if isinstance(tokenizer, (str, PathLike)):
        encoder = open_tokenizer(tokenizer, options.chat_template)
    else:
        encoder = TextEncoder(tokenizer, type(tokenizer).__name__)
        if options.chat_template is not None:
            encoder.use_template(options.chat_template)
    sources = open_sources(data, options)
    return Dataset(sources, encoder, options, rank=rank, world=world, progress=progress)
