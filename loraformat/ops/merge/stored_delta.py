"""What a writer with types of its own keeps of deltas, measured on what it stores."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from loraformat.model.checkpoint import LazyTensor
from loraformat.nf4.kernels.merge_tile import TileSums
from loraformat.ops.merge.retention import Meter, compared

__all__ = ["Stored"]


class Stored:
    """Measures merged tensors as they are stored; a `loraformat.plugins.RoundingObserver`.

    Parameters
    ----------
    sources : mapping of str to LazyTensor
        What each tensor was before the merge, which changed it by low-rank deltas alone.

    meter : Meter
        Takes what is found.
    """

    def __init__(self, sources: Mapping[str, LazyTensor], meter: Meter) -> None:
        self._sources, self._meter = sources, meter

    def before(self, name: str) -> LazyTensor | None:
        """Return what a tensor was before the merge; None of one that is not measured."""
        return self._sources.get(name)

    def compare(
        self,
        before: torch.Tensor,
        wanted: torch.Tensor,
        stored: torch.Tensor,
        untouched: torch.Tensor | None,
    ) -> object:
        """Measure some numbers; see `loraformat.plugins.RoundingObserver`."""
        return compared(before, wanted, stored, untouched)

    def add(self, name: str, measured: object) -> None:
        """Take what `compare` returned."""
        assert isinstance(measured, TileSums)
        self._meter.add(name, measured)
