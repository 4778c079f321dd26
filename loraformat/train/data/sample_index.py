"""Where each sample comes from: 20 bytes of memory per sample."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from loraformat.train.data.row import RowSource

__all__ = ["Sample", "SampleIndex"]


@dataclass(frozen=True, slots=True)
class Sample:
    """Where a sample comes from.

    Attributes
    ----------
    source : int
        Number of the source.
    row : int
        Number of the row in it.
    part : int
        Which piece of its text, or which turn of its conversation.
    begin, length : int
        Which of the part's tokens.
    """

    source: int
    row: int
    part: int
    begin: int
    length: int


class SampleIndex:
    """All samples of some sources.

    Parameters
    ----------
    sources : sequence of RowSource
    """

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
