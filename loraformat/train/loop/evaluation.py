"""Held-out loss: the mean negative log-likelihood of the trained tokens of a whole data set.

The mean is over tokens, not over batches: it does not depend on how rows were batched.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from loraformat.errors import InputError
from loraformat.train.loop.distributed import World

if TYPE_CHECKING:
    from collections.abc import Iterator

    from loraformat.train.batch import Batch
    from loraformat.train.loop.accumulation import Differentiable

__all__ = ["HeldOutLoss", "evaluating", "held_out_loss"]


@dataclass(frozen=True, slots=True)
class HeldOutLoss:
    """A loss in nats per target token, and how many target tokens it was measured on.

    Examples
    --------
    >>> HeldOutLoss(0.0, 5).perplexity
    1.0
    """

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """The exponential of the loss; infinite where it is beyond float64."""
        return math.exp(self.loss) if self.loss < 709 else math.inf


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Switch dropout, and whatever else only training does, off inside this block."""
    was = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was)


def held_out_loss(
    model: Differentiable,
    batches: Iterable[Batch],
    *,
    world: World | None = None,
    device: str | torch.device = "cpu",
) -> HeldOutLoss:
    """Measure the loss on this rank's batches and those of the others; the model is unchanged.

    Raises
    ------
    InputError
        If the data have no target token.
    """
    assert isinstance(model, torch.nn.Module)
    total, trained = 0.0, 0
    with evaluating(model):
        for batch in batches:
            if batch.trained:
                total += float(model.loss(batch.to(device)))
                trained += batch.trained
    total, tokens = (world or World()).sum_numbers([total, trained], device)
    if not tokens:
        raise InputError("the held-out data have no token to measure a loss on")
    return HeldOutLoss(total / tokens, round(tokens))
