"""Encoded samples behind each other in rows, and rows padded to the longest: a batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from loraformat.train.batch import IGNORED, Batch
from loraformat.train.data.batch_plan import Rows

__all__ = ["Tokens", "collate"]


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
