"""The gradient of one step, from several micro-batches on several ranks.

`Gradient.take` adds up gradients of sums; nothing is divided before all of them are known, see
`loraformat.train.loop.gradients`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Protocol

import torch

from loraformat.errors import DivergedError
from loraformat.train.batch import IGNORED, Batch
from loraformat.train.loop.distributed import World
from loraformat.train.loop.gradients import clipped_mean, flat, non_finite, spread

__all__ = [
    "Differentiable",
    "StepSums",
    "accumulate",
    "add_up",
    "diverged_elsewhere",
    "joined",
    "mean_gradient",
]

_SHOWN_SAMPLES = 4

Place = Callable[[int], str]


class Differentiable(Protocol):
    """What a step needs of a model."""

    def loss(self, batch: Batch, *, rows_at_once: int | None = None) -> torch.Tensor:
        """Return the sum of negative log-likelihoods of the learned tokens."""
        ...


@dataclass(frozen=True, slots=True)
class StepSums:
    """Sums over the micro-batches of one step.

    Attributes
    ----------
    loss : float
        Negative log-likelihood (nats).
    trained, tokens : int
        Learned tokens; tokens that are not padding.
    flags : tuple of float
        Whatever else ranks tell each other, added up.
    """

    loss: float = 0.0
    trained: int = 0
    tokens: int = 0
    flags: tuple[float, ...] = ()


def accumulate(
    model: Differentiable,
    batches: Sequence[Batch],
    *,
    seed: int,
    step: int,
    world: World,
    layer_major: bool = False,
    place: Place = str,
) -> StepSums:
    """Add the gradients of micro-batches up in the parameters' ``grad``.

    Parameters
    ----------
    model : Differentiable
    batches : sequence of Batch
        This rank's, on the model's device.
    seed, step : int
        Dropout is drawn anew for each micro-batch from seed, step and the micro-batch's number
        among those of all ranks: so a run that goes on draws what it would have drawn, and two
        ranks draw what one would.
    world : World
    layer_major : bool
        All micro-batches go through a layer before the next layer is read.
    place : callable
        Says where a sample stands in the data, for messages.

    Raises
    ------
    DivergedError
        If a loss is NaN or infinite.
    """
    rows = max((batch.input_ids.shape[0] for batch in batches), default=None)
    whole = layer_major and len(batches) > 1
    total = tokens = 0
    loss = 0.0
    for number, batch in enumerate([joined(batches)] if whole else batches):
        tokens += batch.tokens
        if not batch.trained:
            continue
        torch.manual_seed(_random_state(seed, step, number * world.size + world.rank))
        value = model.loss(batch, rows_at_once=rows if whole else None)
        if not math.isfinite(number_of := float(value.detach())):
            raise _diverged(f"the loss of step {step + 1} is {number_of}", [batch], place)
        loss += number_of
        value.backward()  # type: ignore[no-untyped-call]
        total += batch.trained
    return StepSums(loss, total, tokens)


def _random_state(seed: int, step: int, number: int) -> int:
    digest = sha256(f"loraformat dropout {seed} {step} {number}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _diverged(what: str, batches: Sequence[Batch], place: Place) -> DivergedError:
    rows = [number for batch in batches for row in batch.samples for number in row]
    shown = ", ".join(map(place, rows[:_SHOWN_SAMPLES]))
    more = f" and {len(rows) - _SHOWN_SAMPLES} more" if len(rows) > _SHOWN_SAMPLES else ""
    return DivergedError(
        f"{what}, with the samples {shown}{more}; nothing was updated with it",
        hint="look at them, or use a smaller --lr or --clip; earlier checkpoints are whole",
    )


def diverged_elsewhere(step: int) -> DivergedError:
    """Return the error of a rank whose own losses of a step, the first being 0, are sound."""
    return DivergedError(
        f"a loss of step {step + 1} is not finite on another process, which names the samples",
        hint="see what it said",
    )


def joined(batches: Sequence[Batch]) -> Batch:
    """Return one batch of the rows of several, padded to the longest.

    Examples
    --------
    >>> def batch(length):
    ...     ids = torch.ones(1, length, dtype=torch.int64)
    ...     return Batch(ids, ids, ids.cumsum(1) - 1, ids, ((0,),))
    >>> both = joined([batch(2), batch(3)])
    >>> both.segments.tolist(), both.labels[0].tolist()
    ([[1, 1, 0], [1, 1, 1]], [1, 1, -100])
    """
    longest = max(batch.input_ids.shape[1] for batch in batches)

    def stacked(name: str, padding: int) -> torch.Tensor:
        pieces = [getattr(batch, name) for batch in batches]
        return torch.cat([
            torch.nn.functional.pad(piece, (0, longest - piece.shape[1]), value=padding)
            for piece in pieces
        ])  # fmt: skip

    return Batch(
        stacked("input_ids", 0),
        stacked("labels", IGNORED),
        stacked("position_ids", 0),
        stacked("segments", 0),
        tuple(row for batch in batches for row in batch.samples),
    )


def add_up(
    sums: StepSums,
    parameters: Mapping[str, torch.nn.Parameter],
    world: World,
    flags: Sequence[float] = (),
) -> StepSums:
    """Add up sums and gradients over all ranks: one flat vector, one sum.

    Parameters
    ----------
    sums : StepSums
        This rank's.
    parameters : mapping of str to torch.nn.Parameter
        In the same order on all ranks.
    world : World
    flags : sequence of float
        More numbers to add up; as many on all ranks.
    """
    if world.size == 1:
        return StepSums(sums.loss, sums.trained, sums.tokens, tuple(flags))
    numbers = [sums.loss, sums.trained, sums.tokens, *flags]
    vector = flat(parameters.values(), numbers)
    world.sum(vector)
    spread(vector, parameters.values())
    loss, trained, tokens, *rest = vector[-len(numbers) :].tolist()
    return StepSums(loss, round(trained), round(tokens), tuple(rest))


def mean_gradient(
    parameters: Mapping[str, torch.nn.Parameter],
    sums: StepSums,
    limit: float | None,
    batches: Sequence[Batch],
    step: int,
    place: Place = str,
) -> float:
    """Divide summed gradients by the learned tokens, bound their norm, and return it.

    Raises
    ------
    DivergedError
        If a gradient is NaN or infinite.
    """
    length = clipped_mean(parameters.values(), sums.trained, limit)
    if not math.isfinite(length):
        name = non_finite(parameters) or "one parameter"
        raise _diverged(f"the gradient of {name} in step {step + 1} is not finite", batches, place)
    return length
