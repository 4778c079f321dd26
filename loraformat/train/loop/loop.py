"""The training loop: steps, and between them evaluation and checkpoints.

All that a run depends on is in its `RunState`, the tensors and the position in the data; random
numbers are drawn from the seed and the step. So a run that was killed resumes from its newest
checkpoint and ends with the very bytes that it would have ended with.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch

from loraformat.errors import DivergedError, InputError, printable
from loraformat.model.checkpoint import CarriedFile
from loraformat.train.batch import Batch
from loraformat.train.loop import memory, saved_state
from loraformat.train.loop.accumulation import (
    Differentiable,
    StepSums,
    accumulate,
    add_up,
    diverged_elsewhere,
    mean_gradient,
)
from loraformat.train.loop.distributed import World, added_up
from loraformat.train.loop.evaluation import HeldOutLoss
from loraformat.train.loop.interruption import Interruption
from loraformat.train.loop.metrics import Metrics
from loraformat.train.loop.optimizer import Optimizer
from loraformat.train.loop.optimizer_options import Schedule
from loraformat.train.loop.saved_state import RunState

__all__ = ["Loop", "LoopOptions", "Trainable"]

Observer = Callable[[dict[str, Any]], None]


class Trainable(Differentiable, Protocol):
    """What the loop needs of a model."""

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """Return what is trained, always in the same order."""

    def extra_state(self) -> dict[str, torch.Tensor]:
        """Return what else a resumed run needs; an adapter holds its sum over the ranks."""

    def load_extra_state(self, state: dict[str, torch.Tensor]) -> None:
        """Take over what `extra_state` gave."""

    def save_adapter(
        self,
        path: Path,
        *,
        force: bool = False,
        facts: Mapping[str, Any] | None = None,
        files: tuple[CarriedFile, ...] = (),
    ) -> Path:
        """Write the adapter."""


@dataclass(frozen=True, slots=True)
class LoopOptions:
    """Those of the options of a run that its loop needs, by the same names.

    See `loraformat.train.run.options.TrainOptions`. Here `steps` are those of the whole run, and a
    `clip` of None is no clipping.
    """

    steps: int
    grad_accum: int = 1
    layer_major: bool = False
    clip: float | None = 1.0
    seed: int = 0
    eval_every: int = 0
    save_every: int | None = None
    keep: int = 2
    early_stop: int = 0
    best: bool = False


_SAVE_SECONDS = 600.0


@dataclass
class Loop:
    """One run, from where its state is."""

    model: Trainable
    stream: Iterator[tuple[Batch, dict[str, Any]]]  #: this rank's micro-batches, and places behind
    optimizer: Optimizer
    schedule: Schedule
    options: LoopOptions
    directory: Path  #: of checkpoints
    metrics: Metrics | None  #: None on ranks that do not write
    state: RunState
    identity: Mapping[str, Any] = field(default_factory=dict)  #: JSON that a checkpoint keeps
    world: World = field(default_factory=World)
    device: str = "cpu"
    evaluate: Callable[[], HeldOutLoss] | None = None
    sample: Callable[[], list[tuple[str, str]]] | None = None  #: prompts and continuations
    beside: tuple[CarriedFile, ...] = ()  #: stored next to the adapter in a checkpoint
    place: Callable[[int], str] = str  #: describes a sample by its number
    observe: Observer = lambda event: None  #: takes every step, evaluation, sample, checkpoint

    def __post_init__(self) -> None:
        self._parameters = self.model.trainable()
        self._saved_step = self.state.step
        self._saved_at = self._started = time.monotonic()
        self._seconds_before = self.state.seconds
        self._save_wanted = False
        self._best = self.directory / "best"

    def run(self) -> RunState:
        """Train to the end; KeyboardInterrupt comes after a checkpoint was written."""
        with Interruption(patient=self.world.size > 1) as interruption:
            try:
                while self._look_and_go_on(interruption):
                    self._step(interruption)
            except KeyboardInterrupt:
                if self._saved_step != self.state.step or not self.state.step:
                    self.save()
                raise
            if self._saved_step != self.state.step:
                self.save()
        self._take_best()
        return self.state

    def _look_and_go_on(self, interruption: Interruption) -> bool:
        with interruption.at_once():
            loss = self.evaluate() if self.evaluate and self._is_due() else None
            samples = self.sample() if loss is not None and self.sample else []
        if loss is not None:
            self._take_evaluation(loss, samples)
        if self._wants_checkpoint():
            self.save()
        stale = self.options.early_stop and self.state.stale >= self.options.early_stop
        return self.state.step < self.options.steps and not stale

    # Held-out data

    def _is_due(self) -> bool:
        step, every = self.state.step, self.options.eval_every
        due = step in (0, self.options.steps) or bool(every and step % every == 0)
        return due and self.state.evaluated != step

    def _take_evaluation(self, loss: HeldOutLoss, samples: list[tuple[str, str]]) -> None:
        if self.state.take_evaluation(loss.loss) and self.options.best:
            self._keep_best(loss)
        self._tell("evaluation", {"eval_loss": loss.loss, "eval_perplexity": loss.perplexity})
        for prompt, text in samples:
            self._tell("sample", {"prompt": prompt, "text": text})

    def _keep_best(self, loss: HeldOutLoss) -> None:
        extras = self.world.gather(self.model.extra_state())
        if self.world.is_main_process:
            facts = {"step": self.state.step, "loss": loss.loss}
            tensors = _prefixed("parameter:", self._parameters)
            tensors |= _prefixed("extra:", added_up(extras))
            self.directory.mkdir(parents=True, exist_ok=True)
            saved_state.write(self._best, facts, tensors)

    def _take_best(self) -> None:
        """Take the best parameters, and what was collected up to them.

        The sum over the ranks is rank 0's then, and the others have nothing to add.
        """
        if not self.options.best or self.state.best_step in (None, self.state.step):
            return
        if self.world.is_main_process:
            best = saved_state.read(self._best)
            _copy(best.part("parameter:"), self._parameters)
            self.model.load_extra_state(_copies(best.part("extra:")))
        else:
            state = self.model.extra_state().items()
            self.model.load_extra_state({name: torch.zeros_like(value) for name, value in state})

    # Steps

    def _step(self, interruption: Interruption) -> None:
        begun = time.monotonic()
        # Moments are collected on the way: a step that is given up must not have counted.
        before = _copies(self.model.extra_state())
        try:
            with interruption.at_once():
                batches, places = self._take()
                sums, diverged = self._accumulate(batches)
            late = time.monotonic() - self._saved_at > _SAVE_SECONDS
            flags = [interruption.wanted, self.world.is_main_process and late, diverged is not None]
            sums = add_up(sums, self._parameters, self.world, flags)
            if sums.flags[2] > 0:  # all ranks know, and end together
                raise diverged or diverged_elsewhere(self.state.step)
            rate, length = self._update(sums, batches)
        except BaseException:
            self.model.load_extra_state(before)
            self.optimizer.forget_gradients()
            raise
        self.state.take_step(sums.loss / max(1, sums.trained), sums.trained, sums.tokens)
        self.state.cursor = places[-1]
        self._save_wanted = sums.flags[1] > 0
        seconds = time.monotonic() - begun
        self._tell("step", {
            "loss": self.state.last_loss, "learning_rate": rate, "gradient_norm": length,
            "trained": sums.trained, "tokens": sums.tokens,
            "epoch": self.state.cursor.get("epoch", 0), "seconds": round(seconds, 4),
            "tokens_per_second": round(sums.tokens / max(seconds, 1e-9), 2),
            "memory": memory.held(self.device),
        })  # fmt: skip
        if self.world.size > 1 and sums.flags[0] > 0:  # all ranks know, and stop here
            raise KeyboardInterrupt

    def _accumulate(self, batches: list[Batch]) -> tuple[StepSums, DivergedError | None]:
        """Return this rank's sums; what it found is not raised before the others know it, too."""
        try:
            sums = accumulate(
                self.model, batches, seed=self.options.seed, step=self.state.step,
                world=self.world, layer_major=self.options.layer_major, place=self.place,
            )  # fmt: skip
        except DivergedError as error:
            return StepSums(), error
        return sums, None

    def _take(self) -> tuple[list[Batch], list[dict[str, Any]]]:
        taken = list(islice(self.stream, self.options.grad_accum))
        assert taken, "the data end after the last step, not before"
        return [batch.to(self.device) for batch, _ in taken], [place for _, place in taken]

    def _update(self, sums: StepSums, batches: list[Batch]) -> tuple[float, float]:
        rate = self.schedule(self.state.step)
        if not sums.trained:
            return rate, 0.0
        length = mean_gradient(
            self._parameters, sums, self.options.clip, batches, self.state.step, self.place
        )
        self.optimizer.step(rate)
        return rate, length

    def _tell(self, event: str, members: dict[str, Any]) -> None:
        told = {"step": self.state.step, **members}
        if self.metrics is not None:
            self.metrics.add(told)
        self.observe({"event": event, **told})

    # Checkpoints

    def _wants_checkpoint(self) -> bool:
        every = self.options.save_every
        if self._saved_step == self.state.step:
            return False
        return self._save_wanted if every is None else bool(every) and self.state.step % every == 0

    def save(self) -> None:
        """Write a checkpoint of the last step; all ranks call it together."""
        extras = self.world.gather(self.model.extra_state())
        if self.world.is_main_process:
            self._write(extras)
        self._saved_step, self._saved_at = self.state.step, time.monotonic()
        self._save_wanted = False

    def _write(self, extras: list[dict[str, torch.Tensor]]) -> None:
        assert self.metrics is not None
        self.state.seconds = self._seconds_before + time.monotonic() - self._started
        facts = {
            "step": self.state.step, "run": asdict(self.state), "identity": dict(self.identity),
            "metrics": self.metrics.position(), "optimizer": self.optimizer.numbers(),
        }  # fmt: skip
        tensors = _prefixed("parameter:", self._parameters)
        tensors |= _prefixed("optimizer:", self.optimizer.tensors())
        for rank, extra in enumerate(extras):
            tensors |= _prefixed(f"extra:{rank}:", extra)
        self.directory.mkdir(parents=True, exist_ok=True)
        target = self.directory / saved_state.name_of(self.state.step)
        saved_state.write(
            target, facts, tensors, save_adapter=lambda path: self._save_adapter(path, extras)
        )
        saved_state.prune(self.directory, self.options.keep)
        self.observe({"event": "checkpoint", "step": self.state.step, "path": str(target)})

    def _save_adapter(self, path: Path, extras: list[dict[str, torch.Tensor]]) -> None:
        """Write the adapter with the statistics of all ranks; each rank then keeps its own."""
        self.model.load_extra_state(added_up(extras))
        try:
            self.model.save_adapter(path, files=self.beside)
        finally:
            self.model.load_extra_state(extras[self.world.rank])

    def restore(self, checkpoint: saved_state.Checkpoint) -> None:
        """Resume from a checkpoint, which must be of these parameters."""
        _copy(checkpoint.part("parameter:"), self._parameters)
        self.optimizer.restore(checkpoint.part("optimizer:"), checkpoint.facts["optimizer"])
        self.model.load_extra_state(_copies(checkpoint.part(f"extra:{self.world.rank}:")))


def _prefixed(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {prefix + name: value for name, value in tensors.items()}


def _copies(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in tensors.items()}


def _copy(source: Mapping[str, torch.Tensor], parameters: Mapping[str, torch.Tensor]) -> None:
    if set(source) != set(parameters):
        odd = sorted(set(source) ^ set(parameters))[0]
        raise InputError(
            f"parameter {printable(odd)} is missing in the checkpoint, or one too many"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            if source[name].shape != parameter.shape:
                raise InputError(f"parameter {printable(name)} has another shape in the checkpoint")
            parameter.copy_(source[name])
