"""Encoded samples as padded batches, made ahead on a second thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch

from loraformat.train.batch import IGNORED, Batch
from loraformat.train.data.batch_plan import Rows

__all__ = ["Tokens", "collate", "prefetch"]

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Tokens:
    """One sample: its ids, and which of them are learned."""

    ids: list[int]
    learned: list[bool]


def collate(rows: Rows, sample: Callable[[int], Tokens], padding: int) -> Batch:
    """Return the batch of some samples.

    Parameters
    ----------
    rows : list of tuple of int
        For each row the numbers of its samples.
    sample : callable
        Returns a sample by its number.
    padding : int
        Id to fill rows with. What is padding is known by ``segments``, so that it may be
        an id that is learned elsewhere, such as EOS.

    Examples
    --------
    >>> two = Tokens([5, 6], [False, True])
    >>> collate([(0, 1), (2,)], lambda number: two, padding=0).position_ids.tolist()
    [[0, 1, 0, 1], [0, 1, 0, 0]]
    """
    filled = [[sample(number) for number in row] for row in rows]
    length = max(sum(len(one.ids) for one in row) for row in filled)
    shape = (len(rows), length)
    batch = Batch(
        input_ids=torch.full(shape, padding, dtype=torch.int64),
        labels=torch.full(shape, IGNORED, dtype=torch.int64),
        position_ids=torch.zeros(shape, dtype=torch.int64),
        segments=torch.zeros(shape, dtype=torch.int64),
        samples=tuple(rows),
    )
    for number, row in enumerate(filled):
        begin = 0
        for segment, one in enumerate(row, 1):
            place = (number, slice(begin, begin + len(one.ids)))
            ids = torch.tensor(one.ids, dtype=torch.int64)
            learned = torch.tensor(one.learned, dtype=torch.bool)
            learned[0] = False  # nothing of its own segment stands before it
            batch.input_ids[place] = ids
            batch.labels[place] = torch.where(learned, ids, IGNORED)
            batch.position_ids[place] = torch.arange(len(one.ids))
            batch.segments[place] = segment
            begin += len(one.ids)
    return batch


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
