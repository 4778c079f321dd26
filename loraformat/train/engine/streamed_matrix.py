"""The output head while a loss is computed: its tiles are read ahead and let go behind.

The head of a large vocabulary is as large as several layers, and each pass over it uses every row
once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from loraformat.train.engine.matrix import Matrix, Tile
from loraformat.train.engine.residency import Residency
from loraformat.train.engine.stored_weights import Span

__all__ = ["StreamedMatrix"]


class StreamedMatrix:
    """A matrix whose pages come and go with its tiles while it is streaming.

    Parameters
    ----------
    matrix : Matrix
    spans : sequence of Span
        Its bytes: of each span a share that goes with the rows, as it is with dense numbers,
        packed codes and scales.
    residency : Residency

    Attributes
    ----------
    rows, columns, by_inputs
        As in `Matrix`.
    """

    def __init__(self, matrix: Matrix, spans: Sequence[Span], residency: Residency) -> None:
        self.matrix, self._spans, self._residency = matrix, spans, residency
        self.rows, self.columns, self.by_inputs = matrix.rows, matrix.columns, matrix.by_inputs
        self._streaming = False

    @contextmanager
    def streaming(self) -> Iterator[None]:
        """Let pages go as soon as they are used, as long as this lasts."""
        self._streaming = True
        try:
            yield
        finally:
            self._streaming = False

    def tiles(self, dtype: torch.dtype) -> Iterator[Tile]:
        """Yield what the matrix yields."""
        if not self._streaming:
            yield from self.matrix.tiles(dtype)
            return
        reading = None
        for start, stop, tile in self.matrix.tiles(dtype):
            # The tile is decoded already: while it is computed with, the next ones are read.
            after = self._of_rows(stop, min(2 * stop - start, self.rows))
            coming = self._residency.read_soon(after)
            yield start, stop, tile
            self._residency.let_go(self._of_rows(start, stop), reading)
            reading = coming

    def _of_rows(self, start: int, stop: int) -> list[Span]:
        found = []
        for file, begin, end in self._spans:
            size = end - begin
            part = begin + size * start // self.rows, begin + -(-size * stop // self.rows)
            found.append((file, *part))
        return found
