"""The verb ``train``: one training run, from options to an adapter."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from loraformat.bundle.update import parse_bundle_slot
from loraformat.errors import InputError, LoraFormatError, OutputError, ResourceError, UsageError
from loraformat.ops.opening.model import fingerprint_of
from loraformat.runtimes.chat import GENERATION_NAME
from loraformat.storage.output_rules import refuse_existing, refuse_input_as_output
from loraformat.train.loop import memory, saved_state
from loraformat.train.loop.distributed import World, added_up, own_device
from loraformat.train.loop.evaluation import HeldOutLoss, held_out_loss
from loraformat.train.loop.loop import Loop, LoopOptions
from loraformat.train.loop.metrics import Metrics, check_tensorboard, read_metrics
from loraformat.train.loop.optimizer import Optimizer, check_optimizer, rate_ratios
from loraformat.train.loop.optimizer_options import Schedule
from loraformat.train.loop.saved_state import RunState
from loraformat.train.run import config_file, loss_curve, text_generation
from loraformat.train.run.adapter_files import AdapterFiles, facts_of
from loraformat.train.run.memory_plan import format_bytes, plan_disk
from loraformat.train.run.options import TrainOptions
from loraformat.train.run.report import TrainReport, time_of
from loraformat.train.run.run_directory import RunDirectory, check_same, identity_of
from loraformat.train.run.setup import Inputs, Progress, check_device, open_inputs

__all__ = ["train"]

_NO_MEMORY = ("out of memory", "can't allocate memory")
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_GO_ON = "free some space, then use --resume"


def train(
    options: TrainOptions,
    *,
    resume: bool = False,
    force: bool = False,
    dry_run: bool = False,
    announce: Callable[[TrainReport], None] = lambda report: None,
    observe: Callable[[dict[str, Any]], None] = lambda event: None,
    progress: Progress = lambda done, total: None,
) -> TrainReport:
    """Train an adapter; `loraformat.train.run.verbs.train` is the public function.

    `announce` is called with the plan, before the first step; `observe` with every step,
    evaluation, sample and checkpoint; `progress` with the rows looked at and in total.

    Raises
    ------
    KeyboardInterrupt
        When it was interrupted, after a checkpoint was written.
    LoraFormatError
    """
    output = _check(options, resume=resume, force=force or dry_run)
    options = replace(options, device=own_device(options.device))
    check_device(options.device)
    world = World.join(options.device)
    try:
        inputs = open_inputs(options, world, progress)
        with inputs.model:
            run = _Run(inputs, world, output)
            announce(run.report)
            with run.enough_memory(), run.room_on_disk(), _determinism(options.deterministic):
                if dry_run:
                    run.measure()
                else:
                    run.go(resume=resume, force=force, observe=observe)
            return run.report
    finally:
        world.leave()


@contextmanager
def _determinism(wanted: bool) -> Iterator[None]:
    """Make torch fail on non-deterministic operations."""
    before = torch.are_deterministic_algorithms_enabled()
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _check(options: TrainOptions, *, resume: bool, force: bool) -> Path:
    """Refuse before the work what would be refused after it."""
    if not options.base:
        raise UsageError("no base given", hint="give a bundle")
    if not options.output:
        raise UsageError("no output given", hint="give a path with --output")
    output = Path(options.output)
    place = parse_bundle_slot(output)
    _refuse_inputs(options, output)
    if not resume:
        _refuse_output(output, force=force)
    if place is None and not output.absolute().parent.is_dir():
        raise OutputError("no such directory", path=output.parent, hint="create it first")
    if options.tensorboard:
        check_tensorboard()
    on_cpu = options.device.startswith("cpu")
    if on_cpu and options.device_memory is not None:
        raise UsageError(
            "device-memory is what the base may take on a GPU, and the device is cpu",
            hint="say --device cuda, or bound the whole run with --max-memory",
        )
    options.lora()
    options.data_options()
    check_optimizer(options.optimizer_options(), on_gpu=not on_cpu)
    Schedule(options.schedule, options.lr, 1, options.warmup)
    return output


def _refuse_inputs(options: TrainOptions, output: Path) -> None:
    """Refuse an output that is an input, or whose run directory would be among the data."""
    named = [*options.data, *options.eval, options.adapter, options.original, options.chat_template]
    if parse_bundle_slot(output) is None:
        named.append(options.base)
    inputs = [Path(name) for name in named if name and os.path.lexists(name)]
    refuse_input_as_output(output.absolute(), RunDirectory(output).path, inputs)


def _refuse_output(output: Path, *, force: bool) -> None:
    if parse_bundle_slot(output) is None:
        refuse_existing(output, force=force)
    elif output.exists() and not force:
        raise OutputError("already exists", path=output, hint="use --force to replace it")


class _Run:
    """A run whose inputs are open."""

    def __init__(self, inputs: Inputs, world: World, output: Path) -> None:
        self._inputs, self._world, self._output = inputs, world, output
        options = self._options = inputs.options
        self._directory = RunDirectory(output)
        self._model = inputs.model
        self._base = inputs.model.directory
        self._files = AdapterFiles(options, inputs.encoder, inputs.data, self._base)
        self._carried = self._files.files()
        self.report = TrainReport(
            target=str(output), directory=str(self._directory.path),
            plan=inputs.budget.plan, disk=plan_disk(inputs.budget.dims, options, world.size),
            data=inputs.data.audit.lines(),
            preview=inputs.data.preview(), steps=inputs.steps, batches=inputs.batches,
            trained_parameters=inputs.budget.dims.trained,
            compute=f"{options.device}, {str(self._model.compute_dtype).removeprefix('torch.')}",
        )  # fmt: skip
        self.report.notes.extend([*self._model.notes, *self._notes()])

    def _notes(self) -> Iterator[str]:
        """Say what a user should know before the run."""
        if flags := ", ".join(f"--{flag}" for flag in self._options.ignored_flags()):
            yield f"{flags}: ignored, because --adapter has its own"
        if self._files.has_other_template():
            yield (
                "the adapter has its own chat template of its own, and the model's is used; to use "
                "it, name it with --chat-template"
            )
        if learned := self._files.learned_stops():
            tokenizer = self._inputs.encoder.tokenizer
            ends = " and ".join(tokenizer.convert_ids_to_tokens(learned))
            usual = f", not with {tokenizer.eos_token}" if tokenizer.eos_token else ""
            yield (
                f"turns end with {ends}{usual}: generate stops there; {GENERATION_NAME} "
                "beside the adapter tells others"
            )
        held_out, trained = self._inputs.held_out, self._inputs.trained_too
        if held_out is not None and trained:
            yield (
                f"{trained} of the {held_out.audit.rows} rows of --eval are in the training data: "
                "the loss on them is not a held-out loss"
            )
        free, plan = memory.available(self._options.device), self.report.plan
        if free is not None and plan.to_come > free:
            more, there = format_bytes(plan.to_come), format_bytes(free)
            yield f"the run may need {more} more, and {there} of memory are free"

    @contextmanager
    def enough_memory(self) -> Iterator[None]:
        """Turn what torch says when memory runs out into a `ResourceError` with numbers."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            said = str(error)
            if not isinstance(error, MemoryError) and not any(word in said for word in _NO_MEMORY):
                raise
            plan = self.report.plan
            raise ResourceError(
                f"{self._options.device} has too little memory: the run needs about "
                f"{format_bytes(plan.total)}",
                hint="; or ".join(self._inputs.budget.advice) or "use a larger machine",
            ) from error

    @contextmanager
    def room_on_disk(self) -> Iterator[None]:
        """Name the way to resume, in a `ResourceError`, when the disk is full."""
        try:
            yield
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            path = error.filename or self._directory.path
            raise ResourceError("the disk is full", path=path, hint=_GO_ON) from error
        except ResourceError as error:
            cause = error.__cause__
            if isinstance(cause, OSError) and cause.errno in _NO_ROOM:
                error.hint = _GO_ON
            raise

    def _check_disk(self) -> None:
        """Refuse before the start when the disk cannot hold what the run will write."""
        needed = self.report.disk.total - self._directory.nbytes()
        free = shutil.disk_usage(self._directory.path).free
        if needed > free:
            raise ResourceError(
                f"checkpoints and adapter need {format_bytes(needed)}, and the disk has "
                f"{format_bytes(free)} free",
                path=self._directory.path,
                hint="free some space, or keep fewer with --keep 1",
            )

    def measure(self) -> None:
        """Time one micro-batch, for the report."""
        batch, _ = next(self._inputs.stream({}))
        layers = self._inputs.budget.dims.layers
        step_time = time_of(self._model, batch.to(self._options.device), layers)
        self.report = replace(self.report, dry_run=True, step_time=step_time)

    def go(self, *, resume: bool, force: bool, observe: Callable[[dict[str, Any]], None]) -> None:
        """Train, and write the adapter."""
        if self._world.is_main_process and not (resume and self._directory.path.is_dir()):
            self._directory.begin(force=force)
        self._world.broadcast_object(None)  # that there is a directory now
        alone = self._directory.alone() if self._world.is_main_process else nullcontext()
        with alone:
            checkpoint = self._checkpoint() if resume else None
            finished = self._check_output(checkpoint, resume=resume, force=force)
            if not finished:
                self._check_disk()
            if self._world.is_main_process:
                if checkpoint is None and resume:
                    self._directory.begin(force=True)
                self._directory.write_config(config_file.dump(self._options.to_json()))
            state = self._train(checkpoint, observe)
            self._finish(state, write=not finished, force=force)

    def _checkpoint(self) -> saved_state.Checkpoint | None:
        """Return the checkpoint to resume from: rank 0 chooses."""
        problems: list[str] = []
        found = None
        if self._world.is_main_process:
            found, problems = saved_state.newest(self._directory.checkpoints)
            if found is None and problems:
                raise InputError(
                    f"none of the checkpoints is intact: {problems[0]}",
                    path=self._directory.checkpoints,
                    hint="start again and delete them: --force without --resume",
                )
        self.report.notes.extend(f"skipped: {problem}" for problem in problems)
        step = self._world.broadcast_object(None if found is None else found.step)
        if step is None:
            self.report.notes.append("there was no checkpoint; the run started from the beginning")
            return None
        if found is None:
            found = saved_state.read(self._directory.checkpoints / saved_state.name_of(step))
        if self._world.is_main_process:  # whose device others do not have
            check_same(found.facts.get("identity", {}), self._identity())
        return found

    def _check_output(
        self, checkpoint: saved_state.Checkpoint | None, *, resume: bool, force: bool
    ) -> bool:
        """Tell whether the run is complete; refuse an existing adapter of another run."""
        if not resume or not self._output.exists() or force:
            return False
        if checkpoint is None or not self._is_done(checkpoint):
            _refuse_output(self._output, force=False)
            return False
        self.report = replace(self.report, was_complete=True)
        return True

    def _is_done(self, checkpoint: saved_state.Checkpoint) -> bool:
        early = self._options.early_stop
        stopped = bool(early) and RunState.from_json(checkpoint.facts["run"]).stale >= early
        return stopped or checkpoint.step >= self._inputs.steps

    def _identity(self) -> dict[str, Any]:
        inputs = self._inputs
        return identity_of(
            self._options, base=str(fingerprint_of(self._model.bundle.checkpoint)),
            data=inputs.data.fingerprint,
            held_out=None if inputs.held_out is None else inputs.held_out.fingerprint,
            ranks=self._world.size, steps=inputs.steps, compute=self.report.compute,
        )  # fmt: skip

    def _train(
        self, checkpoint: saved_state.Checkpoint | None, observe: Callable[[dict[str, Any]], None]
    ) -> RunState:
        state = RunState() if checkpoint is None else RunState.from_json(checkpoint.facts["run"])
        metrics = None
        if self._world.is_main_process:
            metrics = Metrics(
                self._directory.metrics,
                position=0 if checkpoint is None else int(checkpoint.facts["metrics"]),
                tensorboard=self._directory.tensorboard if self._options.tensorboard else None,
                step=0 if checkpoint is None else state.step + 1,
            )
        self._model.train()
        for branch in self._model.branches.values():
            branch.moments.share(self._world.size)
        with metrics or nullcontext():
            loop = self._loop(state, metrics, observe)
            if checkpoint is not None:
                loop.restore(checkpoint)
            else:
                self._world.broadcast_parameters(self._model.trainable().values())
            return loop.run()

    def _loop(
        self, state: RunState, metrics: Metrics | None, observe: Callable[[dict[str, Any]], None]
    ) -> Loop:
        options, inputs = self._options, self._inputs
        ratios = rate_ratios(self._model.trainable(), options.lora_plus)
        return Loop(
            model=self._model,
            stream=inputs.stream(state.cursor),
            optimizer=Optimizer(
                self._model.trainable(), options.optimizer_options(), ratios=ratios,
                directory=self._directory.path,
            ),
            schedule=Schedule(options.schedule, options.lr, inputs.steps, options.warmup),
            options=LoopOptions(
                steps=inputs.steps, grad_accum=options.grad_accum,
                layer_major=options.layer_major, clip=options.clip or None, seed=options.seed,
                eval_every=options.eval_every, save_every=options.save_every, keep=options.keep,
                early_stop=options.early_stop, best=options.best,
            ),
            directory=self._directory.checkpoints, metrics=metrics, state=state,
            identity=self._identity(), world=self._world, device=options.device,
            evaluate=self._evaluate if inputs.held_out is not None else None,
            sample=self._sample if options.prompt and self._world.is_main_process else None,
            beside=self._carried, place=inputs.data.place, observe=observe,
        )  # fmt: skip

    def _evaluate(self) -> HeldOutLoss:
        assert self._inputs.held_out is not None
        batches = (batch for batch, _ in self._inputs.held_out.batches(epochs=1))
        return held_out_loss(self._model, batches, world=self._world, device=self._options.device)

    def _sample(self) -> list[tuple[str, str]]:
        encoder = self._inputs.encoder
        stops = text_generation.stop_tokens(self._base, encoder.tokenizer)
        stops = sorted({*stops, *self._files.learned_stops()})
        told = []
        for prompt, ids in zip(self._options.prompt, self._inputs.prompts, strict=True):
            with self._model.sparing():
                stream = text_generation.continuation(
                    self._model, encoder.tokenizer, ids, text_generation.SAMPLE, stops=stops,
                    device=self._options.device,
                )  # fmt: skip
            told.append((prompt, stream.text()))
        return told

    def _finish(self, state: RunState, *, write: bool, force: bool) -> None:
        inputs = self._inputs
        # Sums of statistics that ranks have collected are additive.
        extras = self._world.gather(self._model.extra_state())
        if self._world.size > 1:
            self._model.load_extra_state(added_up(extras))
        if not self._world.is_main_process:
            return
        facts = facts_of(self._options, state, inputs.data, inputs.held_out, self._world.size)
        self.report = replace(self.report, seconds=state.seconds, facts=facts)
        if write:
            self._model.save_adapter(
                self._output, force=force, facts=self.report.facts, files=self._carried
            )
        if self._options.plot:
            self._draw()

    def _draw(self) -> None:
        if find_spec("matplotlib") is None:
            self.report.notes.append("no loss curve: pip install 'loraformat[plot]'")
            return
        title = f"{self._output.name} on {Path(self._options.base).name}"
        try:
            loss_curve.draw(read_metrics(self._directory.metrics), self._directory.picture, title)
        except (OSError, LoraFormatError) as error:  # the adapter stands already
            reason = getattr(error, "strerror", None) or error
            self.report.notes.append(f"no loss curve: {reason}")
