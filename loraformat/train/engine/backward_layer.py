"""Which layer a backward pass is in: told by gradients that come by, in whatever order."""

from __future__ import annotations

from loraformat.train.engine.layer_prefetch import Residency

__all__ = ["BackwardVisit"]


class BackwardVisit:
    """Enters and leaves layers on the way back, one at a time and each once.

    Parameters
    ----------
    residency : Residency

    Examples
    --------
    >>> residency = Residency([[], []])
    >>> visit = BackwardVisit(residency)
    >>> for step in (visit.enter, visit.enter, visit.leave, visit.leave):
    ...     step(1)
    >>> residency.traffic.visits
    [1]
    """

    def __init__(self, residency: Residency) -> None:
        self._residency = residency
        self._layer: int | None = None

    def enter(self, layer: int) -> None:
        """Have a layer's weights in memory from here on, and those of no other."""
        if layer == self._layer:
            return
        if self._layer is not None:
            self._residency.leave(self._layer)
        self._layer = layer
        self._residency.enter(layer, -1)

    def leave(self, layer: int) -> None:
        """Let a layer go, unless that was done."""
        if layer == self._layer:
            self._layer = None
            self._residency.leave(layer)
