"""Gradient accumulation over micro-batches and ranks.

Every forward pass gives the gradient of a *sum* of negative log-likelihoods; sums are added up
over micro-batches and ranks and divided once, by the number of all trained tokens. So a step does
not depend on how its rows were cut into micro-batches, however ragged they are; a mean of means
would.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Protocol

import torch
from torch.nn.utils.rnn import pad_sequence

from loraformat.errors import DivergedError
from loraformat.train.batch import IGNORED, Batch
from loraformat.train.loop.distributed import World

__all__ = [
    "Differentiable",
    "StepSums",
    "accumulate",
    "add_up",
    "clipped_mean",
    "diverged_elsewhere",
    "flat",
    "joined",
    "mean_gradient",
    "non_finite",
    "norm",
    "spread",
]

_SHOWN_SAMPLES = 4

Place = Callable[[int], str]


class Differentiable(Protocol):
    """What a step needs of a model."""

    def loss(self, batch: Batch, *, rows_at_once: int | None = None) -> torch.Tensor:
        """Return the sum of negative log-likelihoods of the target tokens."""


@dataclass(frozen=True, slots=True)
class StepSums:
    """Sums over the micro-batches of one step."""

    loss: float = 0.0  #: negative log-likelihood (nats)
    trained: int = 0  #: target tokens
    tokens: int = 0  #: tokens that are not padding
    flags: tuple[float, ...] = ()  #: whatever else ranks tell each other, added up


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
    """Add the gradients of this rank's micro-batches up in the parameters' ``grad``.

    Dropout is drawn anew for each micro-batch from seed, step and the micro-batch's number among
    those of all ranks: so a resumed run draws what it would have drawn, and two ranks draw what one
    would. With `layer_major` all micro-batches go through a layer before the next layer is read.

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
        drawn = f"loraformat dropout {seed} {step} {number * world.size + world.rank}"
        torch.manual_seed(int.from_bytes(sha256(drawn.encode()).digest()[:8], "little") >> 1)
        value = model.loss(batch, rows_at_once=rows if whole else None)
        if not math.isfinite(number_of := float(value.detach())):
            raise _diverged(f"the loss of step {step + 1} is {number_of}", [batch], place)
        loss += number_of
        value.backward()
        total += batch.trained
    return StepSums(loss, total, tokens)


def _diverged(what: str, batches: Sequence[Batch], place: Place) -> DivergedError:
    rows = [number for batch in batches for row in batch.samples for number in row]
    shown = ", ".join(map(place, rows[:_SHOWN_SAMPLES]))
    more = f" and {len(rows) - _SHOWN_SAMPLES} more" if len(rows) > _SHOWN_SAMPLES else ""
    return DivergedError(
        f"{what}, with the samples {shown}{more}; nothing was updated with it",
        hint="check them, or use a smaller --lr or --clip; earlier checkpoints are intact",
    )


def diverged_elsewhere(step: int) -> DivergedError:
    """Return the error of a rank whose own losses of a step, the first being 0, are sound."""
    return DivergedError(
        f"a loss of step {step + 1} is not finite on another process, which names the samples",
        hint="see its output",
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

    def stacked(name: str, padding: int = 0) -> torch.Tensor:
        rows = [row for batch in batches for row in getattr(batch, name)]
        return pad_sequence(rows, batch_first=True, padding_value=padding)

    labels = stacked("labels", IGNORED)
    rows = tuple(row for batch in batches for row in batch.samples)
    return Batch(stacked("input_ids"), labels, stacked("position_ids"), stacked("segments"), rows)


def add_up(
    sums: StepSums,
    parameters: Mapping[str, torch.nn.Parameter],
    world: World,
    flags: Sequence[float] = (),
) -> StepSums:
    """Add up sums, gradients and `flags` over all ranks: one flat vector, one sum."""
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
    """Divide summed gradients by the number of target tokens, clip their norm, and return it.

    A gradient that is NaN or infinite is a DivergedError.
    """
    length = clipped_mean(parameters.values(), sums.trained, limit)
    if not math.isfinite(length):
        name = non_finite(parameters) or "one parameter"
        raise _diverged(f"the gradient of {name} in step {step + 1} is not finite", batches, place)
    return length


def norm(parameters: Iterable[torch.nn.Parameter]) -> float:
    """Return the Euclidean norm of all gradients together, summed in float64."""
    squares = [
        torch.linalg.vector_norm(p.grad, dtype=torch.float64).square()
        for p in parameters
        if p.grad is not None
    ]
    return float(torch.stack(squares).sum().sqrt()) if squares else 0.0


def clipped_mean(
    parameters: Iterable[torch.nn.Parameter], tokens: int, limit: float | None
) -> float:
    """Divide gradients of a sum by its number of terms, and bound their norm; returns the norm.

    Each ``grad`` is changed in place, rounded once. A mean gradient longer than `limit` is
    shortened to it, as ``torch.nn.utils.clip_grad_norm_`` does; NaN and infinite gradients are left
    alone.

    Examples
    --------
    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> weight.grad = torch.tensor([6.0, 8.0])
    >>> clipped_mean([weight], 2, 1.0), weight.grad
    (5.0, tensor([0.6000, 0.8000]))
    """
    kept = [p for p in parameters if p.grad is not None]
    length = norm(kept) / tokens
    factor = 1.0 if limit is None or not length > limit else limit / length
    for parameter in kept:
        assert parameter.grad is not None
        parameter.grad.mul_(factor / tokens)
    return length


def non_finite(parameters: Mapping[str, torch.nn.Parameter]) -> str | None:
    """Return the name of the first parameter whose gradient has NaN or infinity, if one has."""
    grads = ((name, p.grad) for name, p in parameters.items() if p.grad is not None)
    return next((name for name, grad in grads if not torch.isfinite(grad).all()), None)


def flat(parameters: Iterable[torch.nn.Parameter], extra: Iterable[float]) -> torch.Tensor:
    """Return all gradients behind each other and a few numbers, as one float32 vector.

    A parameter without a gradient counts as zeros; float32 must hold the numbers.
    """
    pieces = [
        (p.grad if p.grad is not None else torch.zeros_like(p)).reshape(-1).float()
        for p in parameters
    ]
    device = pieces[0].device if pieces else None
    return torch.cat([*pieces, torch.tensor(list(extra), dtype=torch.float32, device=device)])


def spread(vector: torch.Tensor, parameters: Iterable[torch.nn.Parameter]) -> None:
    """Put gradients that `flat` made one of back where they came from."""
    position = 0
    for parameter in parameters:
        piece = vector[position : position + parameter.numel()].view_as(parameter)
        position += parameter.numel()
        if parameter.grad is None:
            parameter.grad = torch.empty_like(parameter)
        parameter.grad.copy_(piece)
