"""How many layers keep what their backward pass wants, instead of computing it again.

A layer that is computed again costs a third more time, and one that keeps its activations the
memory for them. They are counted once, when a layer is first computed again, and from then on as
many of the last layers keep theirs as a budget allows: those are the first to give them back. The
gradients are the same bits either way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

__all__ = ["ActivationBudget"]

#: What a heap takes for what is kept in it: there are holes between. 1.65 to 1.75 were measured.
_IN_HEAP = 1.8


@dataclass(slots=True)
class ActivationBudget:
    """Decides which layers keep their activations.

    Parameters
    ----------
    layers : int
    budget : int
        Bytes for activations of all layers that keep them.

    Attributes
    ----------
    counted : int
        Bytes that one layer keeps; 0 until it is known.
    tokens : int
        Of the batch in which they were counted.
    most : int
        Layers that kept theirs in the batch that kept the most.

    Examples
    --------
    >>> kept = ActivationBudget(layers=4, budget=4000)
    >>> kept.keeps(3, tokens=10)
    False
    >>> kept.counted, kept.tokens = 1000, 10
    >>> [kept.keeps(layer, tokens=10) for layer in range(4)]
    [False, False, True, True]
    >>> kept.keeps(1, tokens=5)
    True
    """

    layers: int
    budget: int = 0
    counted: int = 0
    tokens: int = 0
    most: int = 0

    def keeps(self, layer: int, tokens: int) -> bool:
        """Tell whether a layer keeps its activations of a batch of so many tokens."""
        if not self.counted or not tokens:
            return False
        kept = min(self.layers, int(self.budget // self.needed(tokens)))
        self.most = max(self.most, kept)
        return layer >= self.layers - kept

    def needed(self, tokens: int) -> float:
        """Return the bytes that one layer takes to keep its activations.

        Parameters
        ----------
        tokens : int
            Of the batch. With fewer than were counted a layer needs less in proportion at least;
            with more, at most by the square, as scores of all pairs of tokens do.
        """
        ratio = tokens / self.tokens
        return _IN_HEAP * self.counted * (ratio if ratio <= 1 else ratio * ratio)

    def count(self, saved: Sequence[torch.Tensor], tokens: int) -> None:
        """Count what a layer saved for its backward pass, unless it is known.

        Parameters
        ----------
        saved : sequence of torch.Tensor
            Without parameters.
        tokens : int
            Of the batch that one layer computed.
        """
        if self.counted or not self.budget or not tokens:
            return
        storages = {s.data_ptr(): s.nbytes() for s in map(torch.Tensor.untyped_storage, saved)}
        self.counted, self.tokens = sum(storages.values()), tokens
