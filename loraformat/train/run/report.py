"""The report of a training run, planned or done, with the step time measured before it.

A batch is timed whole where that takes seconds. Else one decoder layer's linears are: they are
where the time goes. Every layer is computed twice forward (once to keep its input, once anew)
and once backward.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from loraformat.model.report import Report
from loraformat.train.batch import Batch
from loraformat.train.run.memory_plan import DiskPlan, MemoryPlan

__all__ = ["StepTime", "TrainReport", "duration", "time_of"]

_RECKONED = "estimated from one layer's linears, without attention and head"

#: A whole batch is timed if it is expected to take no longer (seconds).
_PATIENCE = 15.0


@dataclass(frozen=True, slots=True, repr=False)
class TrainReport(Report):
    """A run that is planned, or done.

    Attributes
    ----------
    target, directory : str
        The adapter; the directory of checkpoints and record.
    plan, disk : MemoryPlan, DiskPlan
    data : list of str
        What is in the training data, in sentences.
    preview : str
        One sample, its target tokens between ⟦ and ⟧.
    steps, batches : int
        Of the whole run; micro-batches on this rank.
    trained_parameters : int
    compute : str
        Device and dtype of the products.
    step_time : StepTime or None
        Measured in a dry run.
    facts : dict
        What is stored with the adapter; empty before the end.
    was_complete : bool
        The run that was to be resumed had ended, and its adapter exists: nothing was done.
    """

    target: str
    directory: str
    plan: MemoryPlan
    disk: DiskPlan
    data: list[str]
    preview: str
    steps: int
    batches: int
    trained_parameters: int
    compute: str
    step_time: StepTime | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    was_complete: bool = False

    @property
    def estimated_seconds(self) -> float | None:
        """How long the run will take, without evaluations."""
        return None if self.step_time is None else self.step_time.seconds * self.batches

    def to_dict(self) -> dict[str, Any]:
        """Return it for ``json.dumps``."""
        measured = None
        if self.step_time is not None:
            measured = {
                "micro_batch_seconds": self.step_time.seconds,
                "micro_batch_tokens": self.step_time.tokens,
                "measured": "batch" if self.step_time.whole else "layer",
                "run_seconds": self.estimated_seconds,
            }
        return {
            "target": self.target, "directory": self.directory, "dry_run": self.dry_run,
            "was_complete": self.was_complete,
            "steps": self.steps, "micro_batches": self.batches,
            "trained_parameters": self.trained_parameters, "compute": self.compute,
            "memory": self.plan.to_json(), "disk": self.disk.to_json(), "time": measured,
            "data": self.data, "seconds": self.seconds, "training": self.facts, "notes": self.notes,
        }  # fmt: skip

    def plan_lines(self) -> list[str]:
        """Say before the run what it will be."""
        lines = [
            *(f"data: {line}" for line in self.data),
            f"adapter: {self.trained_parameters:,} parameters; {self.compute}",
            *self.plan.lines(),
            self.disk.line(),
            f"steps: {self.steps}, of {self.batches} micro-batches in all",
        ]
        if self.step_time is not None:
            assert self.estimated_seconds is not None
            how = "timed" if self.step_time.whole else _RECKONED
            lines.append(
                f"time: about {duration(self.estimated_seconds)}; a micro-batch of "
                f"{self.step_time.tokens} tokens takes {self.step_time.seconds:.3g} s ({how})"
            )
        return lines

    def done_lines(self) -> list[str]:
        """Say after the run what it came to."""
        facts, loss, done = self.facts, "", f"wrote {self.target}"
        if facts["steps"]:
            loss = f"loss {facts['first_loss']:.4f} to {facts['last_loss']:.4f}"
        if self.was_complete:
            done = f"{self.target} was already complete; nothing was done"
        lines = [
            f"{done}: {facts['steps']} steps, {facts['tokens']:,} tokens, "
            f"{duration(self.seconds)}, {loss}"
        ]
        if facts.get("heldout_before") is not None:
            before, after = facts["heldout_before"], facts["heldout_after"]
            known = facts.get("held_out_data") or {}
            name = "held-out"
            if trained := known.get("trained_too", 0):
                name = f"evaluated, {trained} of {known.get('rows', 0)} rows trained on"
            lines.append(
                f"{name}: loss {before:.4f} to {after:.4f}, perplexity "
                f"{_exp(before):.4g} to {_exp(after):.4g}"
            )
        return [*lines, f"record: {self.directory}"]


def _exp(loss: float) -> float:
    return math.exp(min(loss, 709.0))


def duration(seconds: float) -> str:
    """Return a time for people.

    Examples
    --------
    >>> duration(7.21), duration(125), duration(7300)
    ('7.2 s', '2 min 5 s', '2 h 1 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{int(seconds // 60)} min {int(seconds % 60)} s"
    return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60)} min"


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of one micro-batch, forward and backward, and its tokens.

    It was timed `whole`, or is estimated from one layer.
    """

    seconds: float
    tokens: int
    whole: bool


def time_of(model: Any, batch: Batch, layers: int) -> StepTime:
    """Time a micro-batch on the model's device; gradients and statistics are as before afterwards.

    `layers` is how many decoder layers the model has.
    """
    tokens = batch.input_ids.numel()
    reckoned = _layer_seconds(model, tokens) * layers
    if reckoned > _PATIENCE:
        return StepTime(reckoned, tokens, whole=False)
    kept = {name: value.clone() for name, value in model.extra_state().items()}
    was = model.training
    model.train()
    try:
        seconds = min(_clock(lambda: model.loss(batch).backward()) for _ in range(2))
    finally:
        model.train(was)
        model.load_extra_state(kept)
        for parameter in model.trainable().values():
            parameter.grad = None
    return StepTime(seconds, tokens, whole=True)


def _layer_seconds(model: Any, tokens: int) -> float:
    """Time the linears of the first layer: twice forward, once backward."""
    total = 0.0
    for module in model.modules():
        if getattr(module, "layer", None) != 0 or not hasattr(module, "in_features"):
            continue
        x = torch.zeros(tokens, module.in_features, device=module.device, requires_grad=True)
        y = module(x)
        gradient = torch.ones_like(y)
        total += 2 * _clock(lambda module=module, x=x: module(x))  # type: ignore[misc]
        total += _clock(lambda y=y, gradient=gradient: y.backward(gradient))  # type: ignore[misc]
    for parameter in model.trainable().values():
        parameter.grad = None
    return total


def _clock(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begun
