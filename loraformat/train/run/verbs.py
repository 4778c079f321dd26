"""The public functions ``train``, ``evaluate`` and ``generate``, with flat options.

What their docstrings say of a run's settings is put in from the table in
`loraformat.train.run.options`, when this module is imported.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

from loraformat.errors import UsageError
from loraformat.ops.arguments import Progress, many, reported
from loraformat.train.run.options import SETTINGS, options_of

if TYPE_CHECKING:
    from loraformat.train.run.evaluate import EvaluationReport
    from loraformat.train.run.generate import GenerationReport
    from loraformat.train.run.report import TrainReport

__all__ = ["Display", "evaluate", "generate", "train"]

_Verb = TypeVar("_Verb", bound=Callable[..., Any])


@runtime_checkable
class Display(Protocol):
    """A progress display that shows more than a bar; ``loraformat train`` has one."""

    def announce(self, report: TrainReport) -> None:
        """Show the plan, before the first step."""

    def observe(self, event: dict[str, Any]) -> None:
        """Show a step, an evaluation, a sample or a checkpoint."""

    def rows(self, done: int, total: int) -> None:
        """Show how many rows of the data were looked at."""

    def batches(self, name: str, done: int, total: int) -> None:
        """Show how many batches of held-out data were measured, with what."""


class _Bar:
    """The display of a progress that is one pair of numbers: steps, or batches."""

    def __init__(self, told: Callable[[int, int], None]) -> None:
        self._told, self._steps = told, 0

    def announce(self, report: TrainReport) -> None:
        self._steps = report.steps

    def observe(self, event: dict[str, Any]) -> None:
        if event["event"] == "step":
            self._told(event["step"], self._steps)

    def rows(self, done: int, total: int) -> None:
        pass

    def batches(self, name: str, done: int, total: int) -> None:
        self._told(done, total)


@contextmanager
def _displayed(progress: Progress | Display, label: str, unit: str) -> Iterator[Display]:
    if isinstance(progress, Display):
        yield progress
        return
    with reported(progress, label, unit) as told:
        yield _Bar(told)


def _with_settings(verb: _Verb) -> _Verb:
    """Put the settings' entries where the docstring of a verb has ``%settings``."""
    documented = set(re.findall(r"^    (\w+)(?: :|$)", verb.__doc__ or "", re.MULTILINE))
    entries = []
    for setting in SETTINGS:
        if setting.name in verb.__annotations__ and setting.name not in documented:
            kind = verb.__annotations__[setting.name].replace(" | None", ", optional")
            text = setting.help.replace(" Repeatable.", "")
            text = re.sub(r"--([a-z-]+)", lambda m: f"`{m[1].replace('-', '_')}`", text)
            if setting.choices:
                text += f" One of {', '.join(f'``{word}``' for word in setting.choices)}."
            wrapped = fill(text, 96, initial_indent=" " * 8, subsequent_indent=" " * 8)
            entries.append(f"    {setting.name} : {kind.replace(' | ', ' or ')}\n{wrapped}\n")
    if verb.__doc__:
        verb.__doc__ = verb.__doc__.replace("    %settings\n", "".join(entries))
    return verb


@_with_settings
def train(
    base: str | Path,
    data: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    rank: int = 16,
    alpha: float | None = None,
    rslora: bool = False,
    targets: str | Sequence[str] = "all-linear",
    ranks: Mapping[str, int] | None = None,
    dropout: float = 0.0,
    init: str = "kaiming",
    original: str | Path | None = None,
    dora: bool = False,
    embeddings: bool = False,
    head: bool = False,
    statistics: bool = True,
    adapter: str | Path | None = None,
    allow_base_mismatch: bool = False,
    seq_len: int | None = None,
    batch_size: int = 1,
    train_on: str = "completions",
    over_length: str = "refuse",
    packing: bool = True,
    shuffle: bool = True,
    bad_rows: str = "refuse",
    split_text: str = "document",
    chat_template: str | Path | None = None,
    subset: str | None = None,
    split: str = "train",
    epochs: int = 1,
    steps: int | None = None,
    grad_accum: int = 4,
    layer_major: bool = False,
    lr: float = 0.0002,
    schedule: str = "cosine",
    warmup: float = 0.03,
    lora_plus: float = 1.0,
    weight_decay: float = 0.0,
    clip: float = 1.0,
    optimizer: str = "adamw",
    optimizer_states: str = "memory",
    seed: int = 0,
    deterministic: bool = False,
    eval: str | Path | Sequence[str | Path] = (),
    eval_every: int = 0,
    early_stop: int = 0,
    best: bool = False,
    prompt: str | Sequence[str] = (),
    save_every: int | None = None,
    keep: int = 2,
    tensorboard: bool = False,
    plot: bool = True,
    device: str = "cpu",
    compute_dtype: str = "auto",
    device_memory: int | str | None = None,
    activation_memory: int | str | None = None,
    max_memory: int | str | None = None,
    resume: bool = False,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress | Display = False,
) -> TrainReport:
    """Train a LoRA adapter on a bundle that need not fit in memory.

    Parameters
    ----------
    base : str or Path
        A bundle. It is memory-mapped; each layer is dequantized when it is needed.
    data : str, Path or a sequence of them
        JSONL, JSON, CSV, Parquet or text files, directories of them, or datasets on the Hub.
    output : str or Path
        The new adapter. Checkpoints and record are written to ``OUTPUT.run``.
    %settings
    resume : bool
        Resume from the newest complete checkpoint; the result is that of an uninterrupted run.
    force : bool
        Replace an existing adapter and its run directory.
    dry_run : bool
        Report the memory plan, the number of steps and a time estimate without training.
    progress : bool or callable
        True shows a bar on stderr; a callable gets the steps done and in total.

    Returns
    -------
    TrainReport

    Raises
    ------
    KeyboardInterrupt
        When it was interrupted, after a checkpoint was written.
    LoraFormatError
        If something is not sound, or does not fit together.
    """
    given = dict(locals())  # every option by its name, as the table of options has them
    from loraformat.train.run.train import train as run

    with _displayed(progress, "train", "step") as display:
        return run(
            options_of(given), resume=resume, force=force, dry_run=dry_run,
            announce=display.announce, observe=display.observe, progress=display.rows,
        )  # fmt: skip


@_with_settings
def evaluate(
    base: str | Path,
    data: str | Path | Sequence[str | Path],
    *,
    adapter: str | Path | Sequence[str | Path] = (),
    seq_len: int | None = None,
    batch_size: int = 1,
    train_on: str = "completions",
    over_length: str = "refuse",
    packing: bool = True,
    bad_rows: str = "refuse",
    split_text: str = "document",
    chat_template: str | Path | None = None,
    subset: str | None = None,
    split: str = "train",
    allow_base_mismatch: bool = False,
    device: str = "cpu",
    compute_dtype: str = "auto",
    device_memory: int | str | None = None,
    progress: Progress | Display = False,
) -> EvaluationReport:
    """Measure loss and perplexity of a base on held-out data, without and with each adapter.

    The loss is the mean negative log-likelihood of the target tokens in nats; perplexity is its
    exponential. Data formats and loss masks are those of training. `base` is a bundle or a model in
    any other format: a safetensors directory, a bitsandbytes checkpoint or a GGUF file.

    Parameters
    ----------
    base : str or Path
    data : str, Path or a sequence of them
        As for `train`.
    adapter : str, Path or a sequence of them
        Also measure the base with this adapter.
    %settings
    progress : bool or callable
        True shows a bar on stderr; a callable gets the batches done and in total, for the base
        and each adapter.

    Returns
    -------
    EvaluationReport
        Losses in nats per target token, by path.

    Raises
    ------
    LoraFormatError
        If something is not sound, or does not fit together.
    """
    # The run that these options would make is without an adapter: `run` opens each of them itself.
    given = {**locals(), "adapter": None}
    from loraformat.train.run.evaluate import evaluate as run

    adapters = [str(path) for path in many(adapter)]
    with _displayed(progress, "eval", "batch") as display:
        return run(options_of(given), adapters, tell=display.batches, progress=display.rows)


@_with_settings
def generate(
    base: str | Path,
    prompt: str,
    *,
    adapter: str | Path | None = None,
    chat: bool = False,
    system: str | None = None,
    max_tokens: int = 256,
    temperature: float = 0.7,
    top_p: float = 0.95,
    seed: int = 0,
    allow_base_mismatch: bool = False,
    device: str = "cpu",
    compute_dtype: str = "auto",
    device_memory: int | str | None = None,
    progress: bool | Callable[[str], None] = False,
) -> GenerationReport:
    """Generate text from a prompt.

    `base` is a bundle or a model in any other format: a safetensors directory, a bitsandbytes
    checkpoint or a GGUF file. It is memory-mapped, so a model larger than memory works, slowly.

    Parameters
    ----------
    base : str or Path
    prompt : str
    adapter : str or Path, optional
        Apply this adapter.
    chat : bool
        Apply the adapter's chat template, or the model's, to the prompt.
    system : str, optional
        With `chat`: the system message.
    max_tokens : int
        Maximum number of new tokens.
    temperature : float
        Sampling temperature; 0 is greedy decoding.
    top_p : float
        Nucleus sampling: sample from the smallest set of tokens with this total probability.
    seed : int
        Random seed for sampling.
    %settings
    progress : bool or callable
        True prints the text on stderr as it is generated; a callable gets each new piece.

    Returns
    -------
    GenerationReport

    Raises
    ------
    LoraFormatError
        If something is not sound, or does not fit together.
    """
    # A run has options of these names, too, for its samples and its initialisation.
    given = {**locals(), "prompt": None, "seed": None}
    from loraformat.train.run.generate import generate as run
    from loraformat.train.run.text_generation import GenerationOptions

    if system and not chat:
        raise UsageError("--system needs --chat", hint="add --chat")
    drawn = GenerationOptions(max_tokens, temperature, top_p, seed)
    tell = progress
    if isinstance(tell, bool):
        tell = _on_stderr if tell else lambda piece: None
    return run(options_of(given), prompt, drawn, chat=chat, system=system, tell=tell)


def _on_stderr(piece: str) -> None:
    sys.stderr.write(piece)
    sys.stderr.flush()
