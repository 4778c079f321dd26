"""The public functions ``train``, ``evaluate`` and ``generate``, with flat options."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraformat.errors import UsageError
from loraformat.ops.arguments import Progress, many, reported
from loraformat.train.run.options import options_of

if TYPE_CHECKING:
    from loraformat.train.run.evaluate import EvaluationReport
    from loraformat.train.run.generate import GenerationReport
    from loraformat.train.run.report import TrainReport

__all__ = ["evaluate", "generate", "train"]


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
    progress: Progress = False,
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
    rank : int
        Rank of every module.
    alpha : float, optional
        LoRA alpha; deltas are scaled by alpha/rank. [default: the rank]
    rslora : bool
        Rank-stabilised LoRA: scale by alpha/sqrt(rank).
    targets : str or sequence of str
        Target modules: all-linear, attention, mlp, module names or globs.
    ranks : mapping of str to int, optional
        Rank of modules that match a name or glob.
    dropout : float
        LoRA dropout probability.
    init : str
        Initialisation of the factors. One of ``kaiming``, ``gaussian``, ``orthogonal``,
        ``pissa``, ``loftq``.
    original : str or Path, optional
        Unquantized original of the base, for init loftq.
    dora : bool
        DoRA: also train a magnitude per output feature.
    embeddings : bool
        Also adapt the token embeddings.
    head : bool
        Also adapt the output head.
    statistics : bool
        Collect activation statistics for `reduce`.
    adapter : str or Path, optional
        Continue training this adapter, with its ranks and scaling.
    seq_len : int, optional
        Maximum sequence length in tokens. [default: 512, or the model's context if shorter]
    batch_size : int
        Sequences per micro-batch.
    train_on : str
        Compute the loss on completions and assistant turns only, or on all tokens. One of
        ``completions``, ``all``.
    over_length : str
        What to do with samples longer than seq-len. One of ``refuse``, ``drop``, ``split``,
        ``truncate``, ``truncate-start``.
    packing : bool
        Pack several samples into one sequence.
    shuffle : bool
        Shuffle the samples in each epoch.
    bad_rows : str
        What to do with rows that cannot be read. One of ``refuse``, ``skip``.
    split_text : str
        Treat a text file as one document, or each paragraph as one. One of ``document``,
        ``paragraphs``.
    chat_template : str or Path, optional
        Jinja chat template that replaces the tokenizer's.
    subset : str, optional
        Subset of a dataset on the Hub.
    split : str
        Split of a dataset on the Hub.
    epochs : int
        Number of epochs.
    steps : int, optional
        Number of optimizer steps; overrides epochs.
    grad_accum : int
        Gradient accumulation: micro-batches per step, weighted by their target tokens.
    layer_major : bool
        Run all micro-batches of a step through one layer before reading the next; for slow
        disks.
    lr : float
        Peak learning rate.
    schedule : str
        Learning-rate schedule after warmup. One of ``cosine``, ``linear``, ``constant``.
    warmup : float
        Warmup steps, or a fraction of all steps if below 1.
    lora_plus : float
        LoRA+: ratio of the learning rate of B to that of A.
    weight_decay : float
        Decoupled weight decay of matrices.
    clip : float
        Maximum gradient norm; 0 disables clipping.
    optimizer : str
        Optimizer; the 8-bit ones need bitsandbytes. One of ``adamw``, ``sgd``,
        ``adamw-8bit``, ``paged-adamw-8bit``.
    optimizer_states : str
        Where to keep the AdamW states; does not affect the result. One of ``memory``,
        ``disk``.
    seed : int
        Random seed for initialisation, shuffling and dropout.
    deterministic : bool
        Fail on non-deterministic GPU kernels.
    eval : str or Path or sequence of them
        Held-out data to evaluate on.
    eval_every : int
        Steps between evaluations; 0 evaluates only before and after training.
    early_stop : int
        Stop after this many evaluations without a lower held-out loss; 0 disables it.
    best : bool
        Write the adapter with the lowest held-out loss instead of the last.
    prompt : str or sequence of str
        Generate a sample from this prompt at every evaluation.
    save_every : int, optional
        Steps between checkpoints. [default: one every ten minutes]
    keep : int
        Number of checkpoints to keep.
    tensorboard : bool
        Also log to TensorBoard.
    plot : bool
        Plot the loss curve, if matplotlib is installed.
    device : str
        Device: cpu, cuda, cuda:1, …
    compute_dtype : str
        Dtype of activations and matrix products (f16: of products only). auto: f32 on a
        CPU, bf16 on a GPU; fastest: bf16 also on a CPU that multiplies it faster. One of
        ``auto``, ``fastest``, ``f32``, ``bf16``, ``f16``.
    device_memory : int or str, optional
        GPU memory for base weights; the rest is streamed.
    activation_memory : int or str, optional
        Memory for activations that are kept for the backward pass; other layers recompute
        theirs (gradient checkpointing). [default: half of the memory left when the whole
        base is cached]
    max_memory : int or str, optional
        Fail before training if the memory plan needs more.
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

    with reported(progress, "train", "step") as told:
        steps = 0

        def announce(plan: TrainReport) -> None:
            nonlocal steps
            steps = plan.steps

        def observe(event: Mapping[str, Any]) -> None:
            if event["event"] == "step":
                told(event["step"], steps)

        return run(
            options_of(given), resume=resume, force=force, dry_run=dry_run, announce=announce,
            observe=observe,
        )  # fmt: skip


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
    device: str = "cpu",
    compute_dtype: str = "auto",
    device_memory: int | str | None = None,
    progress: Progress = False,
) -> EvaluationReport:
    """Measure loss and perplexity of a base on held-out data, without and with each adapter.

    Parameters
    ----------
    base : str or Path
        A bundle, or a model in any other format.
    data : str, Path or a sequence of them
        As for `train`.
    adapter : str, Path or a sequence of them
        Also measure the base with each of these.
    seq_len : int, optional
        Maximum sequence length in tokens. [default: 512, or the model's context if shorter]
    batch_size : int
        Sequences per micro-batch.
    train_on : str
        Compute the loss on completions and assistant turns only, or on all tokens. One of
        ``completions``, ``all``.
    over_length : str
        What to do with samples longer than seq-len. One of ``refuse``, ``drop``, ``split``,
        ``truncate``, ``truncate-start``.
    packing : bool
        Pack several samples into one sequence.
    bad_rows : str
        What to do with rows that cannot be read. One of ``refuse``, ``skip``.
    split_text : str
        Treat a text file as one document, or each paragraph as one. One of ``document``,
        ``paragraphs``.
    chat_template : str or Path, optional
        Jinja chat template that replaces the tokenizer's.
    subset : str, optional
        Subset of a dataset on the Hub.
    split : str
        Split of a dataset on the Hub.
    device : str
        Device: cpu, cuda, cuda:1, …
    compute_dtype : str
        Dtype of activations and matrix products (f16: of products only). auto: f32 on a
        CPU, bf16 on a GPU; fastest: bf16 also on a CPU that multiplies it faster. One of
        ``auto``, ``fastest``, ``f32``, ``bf16``, ``f16``.
    device_memory : int or str, optional
        GPU memory for base weights; the rest is streamed.
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
    with reported(progress, "eval", "batch") as told:
        return run(options_of(given), adapters, tell=lambda name, done, total: told(done, total))


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
    device: str = "cpu",
    compute_dtype: str = "auto",
    device_memory: int | str | None = None,
    progress: bool | Callable[[str], None] = False,
) -> GenerationReport:
    """Generate text from a prompt.

    Parameters
    ----------
    base : str or Path
        A bundle, or a model in any other format.
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
    device : str
        Device: cpu, cuda, cuda:1, …
    compute_dtype : str
        Dtype of activations and matrix products (f16: of products only). auto: f32 on a
        CPU, bf16 on a GPU; fastest: bf16 also on a CPU that multiplies it faster. One of
        ``auto``, ``fastest``, ``f32``, ``bf16``, ``f16``.
    device_memory : int or str, optional
        GPU memory for base weights; the rest is streamed.
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
    return run(options_of(given), prompt, drawn, chat=chat, system=system, tell=_teller(progress))


def _teller(progress: bool | Callable[[str], None]) -> Callable[[str], None]:
    if not isinstance(progress, bool):
        return progress
    return _on_stderr if progress else lambda piece: None


def _on_stderr(piece: str) -> None:
    sys.stderr.write(piece)
    sys.stderr.flush()
