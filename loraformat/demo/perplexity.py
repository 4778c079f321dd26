"""Reproducible perplexity of a causal language model on a text.

The text is encoded into tokens t₁ … t_N, a BOS token t₀ is put before them, and the
stream is cut into windows. Each token is predicted once, from the tokens before it
in its window:

    nats per token = -1/N · Σ log p(tᵢ | tⱼ: j in the same window, j < i)
    perplexity     = exp(nats per token)
    bits per byte  = nats per token · N / (ln 2 · bytes of the text)

Perplexity depends on the tokenizer; bits per byte compares models of any vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any

from loraformat.errors import InputError, MissingDependencyError

if TYPE_CHECKING:
    import torch

__all__ = ["Perplexity", "load", "perplexity_of"]


@dataclass(frozen=True, slots=True)
class Perplexity:
    """Perplexity of a model on a text of so many predicted tokens, and bytes of UTF-8.

    Examples
    --------
    >>> coin = Perplexity(nats_per_token=math.log(2), tokens=8, bytes=4)
    >>> coin.perplexity, coin.bits_per_byte
    (2.0, 2.0)
    """

    nats_per_token: float
    tokens: int
    bytes: int

    @property
    def perplexity(self) -> float:
        """Exponential of the mean negative log-likelihood per token."""
        return math.exp(self.nats_per_token)

    @property
    def bits_per_byte(self) -> float:
        """Bits that an arithmetic coder driven by the model needs for one byte of the text."""
        return self.nats_per_token * self.tokens / math.log(2) / self.bytes


def load(model_dir: str | PathLike[str]) -> tuple[Any, Any]:
    """Load a model in float32 and its tokenizer, without network or remote code.

    Raises
    ------
    MissingDependencyError
        If torch or transformers is not installed.
    """
    try:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise MissingDependencyError(
            f"{error.name} is not installed, and measuring perplexity needs it",
            hint="run: pip install 'loraformat[demo]'",
        ) from error

    here = fspath(model_dir)
    tokenizer = AutoTokenizer.from_pretrained(here, local_files_only=True, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(
        here, dtype=torch.float32, local_files_only=True, trust_remote_code=False
    )
    return model, tokenizer


def perplexity_of(
    model: Any, tokenizer: Any, text: str, *, window: int = 512, batch_size: int = 8
) -> Perplexity:
    """Measure a model that `load` returned, perhaps with an adapter of PEFT, on a text.

    `window` is the longest context, in tokens; `batch_size`, windows at once, changes the time and
    not the result. All tokens are predicted, but the first if the tokenizer knows no BOS. The model
    is left in evaluation mode.

    Raises
    ------
    InputError
        If the text has no tokens to predict.
    """
    import torch

    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    stream = torch.tensor([t for t in (tokenizer.bos_token_id, *ids) if t is not None])
    if len(stream) < 2:
        raise InputError("the text has no tokens to predict", hint="give a longer text")
    model.eval()
    _compute_4bit_exactly(model)
    with torch.inference_mode():
        nats = sum(_nats(model, *pair) for pair in _batches(stream, window, batch_size))
    return Perplexity(nats / (len(stream) - 1), len(stream) - 1, len(text.encode()))


def _batches(
    stream: torch.Tensor, window: int, batch_size: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Cut a stream into (inputs, targets); the last window, if shorter, is a batch by itself."""
    whole = (len(stream) - 1) // window * window
    inputs, targets = (
        [*part[:whole].view(-1, window).split(batch_size), part[whole:].unsqueeze(0)]
        for part in (stream[:-1], stream[1:])
    )
    return [pair for pair in zip(inputs, targets, strict=True) if pair[0].numel()]


def _nats(model: Any, inputs: torch.Tensor, targets: torch.Tensor) -> float:
    """Sum the negative log-likelihood of a batch."""
    import torch

    logits = model(input_ids=inputs.to(model.device), use_cache=False).logits
    losses = torch.nn.functional.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten().to(logits.device), reduction="none"
    )
    return float(losses.double().sum())


def _compute_4bit_exactly(model: Any) -> None:
    """Let the 4-bit linears of bitsandbytes, which have no dropout, train, and multiply in f32.

    On some CPUs they re-lay their weights in place and round their scales to bfloat16 at the first
    forward in evaluation mode; in training mode the stored values are used as they are.
    """
    import torch

    for module in model.modules():
        kind = type(module)
        if kind.__name__ == "Linear4bit" and kind.__module__.startswith("bitsandbytes"):
            module.training = True
            module.compute_dtype = torch.float32
