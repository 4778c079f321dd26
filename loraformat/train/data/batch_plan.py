"""The batches of an epoch, planned from the lengths of the samples, and a position among them.

Everything follows from lengths, seed and epoch, so an epoch can be planned again from any point of
it. It is planned window by window; a window is packed, or sorted by length, for itself.

The shuffled order is computed, not stored. A Feistel network on the smallest even number of bits
that holds n numbers is a bijection whatever its round function; positions that fall outside of n
are sent through it again until they fall inside (cycle walking), which keeps it a bijection. It is
integer arithmetic only, so that the order is the same on every machine, and any part of it can be
had at once.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.utils.rnn import pad_sequence

from loraformat.errors import InputError
from loraformat.train.batch import IGNORED, Batch
from loraformat.train.data.encode import Encoded
from loraformat.train.data.options import DataOptions

__all__ = [
    "BatchPlan",
    "DataPosition",
    "Permutation",
    "Rows",
    "best_fit",
    "collate",
    "next_fit",
    "prefetch",
]

Rows = list[tuple[int, ...]]
"""A batch: for each row the samples in it."""

Item = TypeVar("Item")

_PACKED_TOGETHER = 8192
_BATCHES_SORTED_TOGETHER = 64
_SAMPLES, _ROWS = 0, 1  # what a permutation is for: part of its key

_ROUNDS = 6
_WORD = (1 << 64) - 1


class BatchPlan:
    """The batches of every epoch, from the tokens of each sample: integers ``[samples]``."""

    def __init__(self, lengths: npt.NDArray[np.uint32], options: DataOptions) -> None:
        self._lengths, self._options = lengths, options

    def batches(self, epoch: int) -> Iterator[Rows]:
        """Yield the batches of an epoch, of all ranks, in order."""
        options = self._options
        if not options.shuffle:
            return _grouped(self._rows_in_order(), options.batch_size)
        if options.packing:
            return _grouped(self._packed_rows(epoch), options.batch_size)
        return self._sorted_batches(epoch)

    def _rows_in_order(self) -> Iterator[tuple[int, ...]]:
        if self._options.packing:
            return next_fit(enumerate(self._lengths.tolist()), self._options.seq_len)
        return ((sample,) for sample in range(len(self._lengths)))

    def _windows(self, epoch: int, size: int) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
        n = len(self._lengths)
        order = Permutation(n, self._options.seed, epoch, _SAMPLES)
        for number, begin in enumerate(range(0, n, size)):
            yield number, order(np.arange(begin, min(begin + size, n)))

    def _shuffled(self, items: list[Item], epoch: int, window: int) -> Iterator[Item]:
        order = Permutation(len(items), self._options.seed, epoch, _ROWS, window)
        return (items[place] for place in order(np.arange(len(items))).tolist())

    def _packed_rows(self, epoch: int) -> Iterator[tuple[int, ...]]:
        for window, samples in self._windows(epoch, _PACKED_TOGETHER):
            packed = best_fit(self._lengths[samples].tolist(), self._options.seq_len)
            rows = [tuple(samples[row].tolist()) for row in packed]
            yield from self._shuffled(rows, epoch, window)

    def _sorted_batches(self, epoch: int) -> Iterator[Rows]:
        size = self._options.batch_size
        for window, samples in self._windows(epoch, size * _BATCHES_SORTED_TOGETHER):
            by_length = samples[np.argsort(self._lengths[samples], kind="stable")]
            batches = list(_grouped(((sample,) for sample in by_length.tolist()), size))
            yield from self._shuffled(batches, epoch, window)


def _grouped(rows: Iterable[tuple[int, ...]], size: int) -> Iterator[Rows]:
    iterator = iter(rows)
    while group := list(islice(iterator, size)):
        yield group


def best_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """Pack by best-fit decreasing: each sample, longest first, goes where least is left over.

    Never more than 11/9 of the fewest possible rows, and one (Johnson 1973). `capacity` is the
    tokens of a row. Rows hold positions in `lengths`; equal lengths keep their order, so that the
    result is the same everywhere.

    Examples
    --------
    >>> best_fit([3, 5, 4, 2], 8)
    [[1, 0], [2, 3]]
    """
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # sorted: (tokens left, row)
    for position in sorted(range(len(lengths)), key=lambda position: -lengths[position]):
        length = lengths[position]
        place = bisect_left(free, (length, -1))
        if place < len(free):
            left, row = free.pop(place)
        else:
            left, row = capacity, len(rows)
            rows.append([])
        rows[row].append(position)
        insort(free, (left - length, row))
    return rows


def next_fit(lengths: Iterable[tuple[int, int]], capacity: int) -> Iterator[tuple[int, ...]]:
    """Pack pairs of sample and tokens in order: a row ends where the next sample does not fit.

    Examples
    --------
    >>> list(next_fit([(0, 3), (1, 5), (2, 4)], 8))
    [(0, 1), (2,)]
    """
    row: list[int] = []
    used = 0
    for sample, length in lengths:
        if row and used + length > capacity:
            yield tuple(row)
            row, used = [], 0
        row.append(sample)
        used += length
    if row:
        yield tuple(row)


class Permutation:
    """A permutation of 0 … n - 1, with n at most 2⁶²: another for each seed, epoch and purpose.

    Examples
    --------
    >>> order = Permutation(5, 0)
    >>> sorted(order(np.arange(5)).tolist())
    [0, 1, 2, 3, 4]
    """

    def __init__(self, n: int, *key: int) -> None:
        self._n = n
        self._half = max(1, (max(n - 1, 1).bit_length() + 1) // 2)
        state = np.zeros(1, np.uint64)
        for number in key:
            state = _mixed(state ^ np.uint64(number & _WORD))
        self._keys = [_mixed(state ^ np.uint64(turn)) for turn in range(_ROUNDS)]

    def __call__(self, places: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the items at these places: int64, of the same shape."""
        items = self._feistel(places.astype(np.uint64))
        while (outside := items >= np.uint64(self._n)).any():
            items[outside] = self._feistel(items[outside])
        return items.astype(np.int64)

    def _feistel(self, items: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        half, mask = np.uint64(self._half), np.uint64((1 << self._half) - 1)
        left, right = items >> half, items & mask
        for key in self._keys:
            left, right = right, left ^ (_mixed(right ^ key) & mask)
        return (left << half) | right


def _mixed(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Return the finalizer of SplitMix64 (Steele, Lea, Flood 2014), modulo 2⁶⁴."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@dataclass(frozen=True, slots=True)
class DataPosition:
    """The next batch: of which epoch, and which in it, both from 0 and the same on every rank.

    `data` is the fingerprint of samples and options, or empty for the start of any data. A
    cursor of other data is refused, instead of continuing somewhere else in it.

    Examples
    --------
    >>> DataPosition.from_json(DataPosition(epoch=1, batch=20).to_json())
    DataPosition(epoch=1, batch=20, data='')
    """

    epoch: int = 0
    batch: int = 0
    data: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return what ``json.dumps`` takes."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> DataPosition:
        """Return the cursor that `to_json` wrote; InputError if it is none."""
        epoch, batch, data = (fields.get(name) for name in ("epoch", "batch", "data"))
        sound = all(type(n) is int and 0 <= n < 1 << 53 for n in (epoch, batch))
        if not sound or not isinstance(data, str) or len(fields) != 3:
            raise InputError(f"not a data cursor: {dict(fields)!r:.120}")
        return cls(int(epoch or 0), int(batch or 0), data)


def collate(rows: Rows, sample: Callable[[int], Encoded], padding: int) -> Batch:
    """Return the batch of some samples, by their numbers.

    Rows are filled with `padding`. What is padding is known by ``segments``, so that it may be an
    id that is a target elsewhere, such as EOS.

    Examples
    --------
    >>> two = Encoded([5, 6], [False, True], ["a", "b"], ends=True)
    >>> collate([(0, 1), (2,)], lambda number: two, padding=0).position_ids.tolist()
    [[0, 1, 0, 1], [0, 1, 0, 0]]
    """
    filled: list[tuple[torch.Tensor, ...]] = []
    for row in rows:
        samples = [sample(number) for number in row]
        ids = torch.tensor([token for one in samples for token in one.ids])
        positions = torch.cat([torch.arange(len(one.ids)) for one in samples])
        learned = torch.tensor([yes for one in samples for yes in one.learned])
        learned &= positions > 0  # nothing of its own segment stands before the first
        segments = (positions == 0).cumsum(0)
        filled.append((ids, torch.where(learned, ids, IGNORED), positions, segments))
    ids, labels, positions, segments = (
        pad_sequence(list(column), batch_first=True, padding_value=fill)
        for column, fill in zip(zip(*filled, strict=True), (padding, IGNORED, 0, 0), strict=True)
    )
    return Batch(ids, labels, positions, segments, tuple(rows))


def prefetch(items: Iterator[Item], depth: int = 2) -> Iterator[Item]:
    """Yield the items in order, ``depth`` of them made in advance.

    An error is raised where the item would have come. The thread ends with the iterator.

    Examples
    --------
    >>> list(prefetch(iter("abc")))
    ['a', 'b', 'c']
    """
    end = object()
    pending: deque[Future[Item | object]] = deque()
    with ThreadPoolExecutor(1, thread_name_prefix="loraformat-data") as pool:
        try:
            pending.extend(pool.submit(next, items, end) for _ in range(depth))
            while (item := pending.popleft().result()) is not end:
                pending.append(pool.submit(next, items, end))
                yield item  # type: ignore[misc]
        finally:
            for future in pending:
                future.cancel()
