"""From the lengths of the samples to the batches of an epoch: arithmetic, and no text.

Everything follows from lengths, seed and epoch, so an epoch can be planned again from any
point of it. It is planned window by window; a window is packed, or sorted by length, for
itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np
import numpy.typing as npt

from loraformat.train.data.options import DataOptions
from loraformat.train.data.packing import best_fit, next_fit
from loraformat.train.data.permutation import Permutation

__all__ = ["BatchPlan", "Rows"]

Rows = list[tuple[int, ...]]
"""A batch: for each row the samples in it."""

_PACKED_TOGETHER = 8192
_BATCHES_SORTED_TOGETHER = 64
_SAMPLES, _ROWS = 0, 1  # what a permutation is for: part of its key


class BatchPlan:
    """The batches of every epoch.

    Parameters
    ----------
    lengths : numpy.ndarray
        Tokens of each sample; integers ``[samples]``.
    options : DataOptions
    """

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

    def _shuffled(self, items: list[Rows], epoch: int, window: int) -> Iterator[Rows]:
        order = Permutation(len(items), self._options.seed, epoch, _ROWS, window)
        return (items[place] for place in order(np.arange(len(items))).tolist())

    def _packed_rows(self, epoch: int) -> Iterator[tuple[int, ...]]:
        for window, samples in self._windows(epoch, _PACKED_TOGETHER):
            packed = best_fit(self._lengths[samples].tolist(), self._options.seq_len)
            rows = [[tuple(samples[row].tolist())] for row in packed]
            for (row,) in self._shuffled(rows, epoch, window):
                yield row

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
