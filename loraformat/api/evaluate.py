"""``loraformat.evaluate`` and ``loraformat.generate``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from loraformat.api.arguments import many
from loraformat.api.progress import Progress, reported

if TYPE_CHECKING:
    from loraformat.train.run.evaluate import EvaluationReport
    from loraformat.train.run.generate import GenerationReport

__all__ = ["evaluate", "generate"]


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
    from loraformat.api.train_options import options_of
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
    from loraformat.api.train_options import options_of
    from loraformat.errors import UsageError
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
