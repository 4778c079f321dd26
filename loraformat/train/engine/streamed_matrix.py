"""The output head while a loss is computed: its rows are read ahead and let go behind.

The head of a large vocabulary is as large as several layers, and each pass over it uses every row
once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from loraformat.train.engine.layer_prefetch import Residency
from loraformat.train.engine.matrix import Matrix, Range, Tile
from loraformat.train.engine.stored_weights import Span

__all__ = ["StreamedMatrix"]

#: Elements of the rows that are in memory for one product, and of those that are read meanwhile.
_STRETCH = 8 << 20
_FEWEST_ROWS = 64


class StreamedMatrix:
    """A matrix whose pages come and go with its rows while it is streaming.

    Parameters
    ----------
    matrix : Matrix
    spans : sequence of Span
        Its bytes: of each span a share that goes with the rows, as it is with dense numbers,
        packed codes and scales.
    residency : Residency

    Attributes
    ----------
    rows, columns, in_out_layout, device
        As in `Matrix`.
    """

    def __init__(self, matrix: Matrix, spans: Sequence[Span], residency: Residency) -> None:
        self.matrix, self._spans, self._residency = matrix, spans, residency
        self.rows, self.columns, self.in_out_layout = (
            matrix.rows,
            matrix.columns,
            matrix.in_out_layout,
        )
        self.device = matrix.device
        self._streaming = False

    @contextmanager
    def streaming(self) -> Iterator[None]:
        """Let pages go as soon as they are used, as long as this lasts."""
        self._streaming = True
        try:
            yield
        finally:
            self._streaming = False

    def row_chunks(self) -> Iterator[Range]:
        """Yield a few rows at a time while it is streaming, else what the matrix yields."""
        if not self._streaming:
            yield from self.matrix.row_chunks()
            return
        step = max(_FEWEST_ROWS, _STRETCH // max(self.columns, 1))
        reading = None
        for start in range(0, self.rows, step):
            stop = min(start + step, self.rows)
            coming = self._residency.read_ahead(self._of_rows(stop, min(stop + step, self.rows)))
            yield start, stop
            self._residency.evict(self._of_rows(start, stop), reading)
            reading = coming

    def block(self, rows: Range, columns: Range, dtype: torch.dtype) -> torch.Tensor:
        """Return the matrix's block."""
        return self.matrix.block(rows, columns, dtype)

    def tiles(self, dtype: torch.dtype) -> Iterator[Tile]:
        """Yield the matrix's tiles, whether it is streaming or not."""
        return self.matrix.tiles(dtype)

    def _of_rows(self, start: int, stop: int) -> list[Span]:
        found = []
        for file, begin, end in self._spans:
            size = end - begin
            part = begin + size * start // self.rows, begin + -(-size * stop // self.rows)
            found.append((file, *part))
        return found
