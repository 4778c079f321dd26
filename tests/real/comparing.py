"""What transformers and llama.cpp say of one model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1] / "gguf"))

from llama_runtime import apply_template, log_probabilities, tokenize

__all__ = [
    "apart",
    "apply_template",
    "by_llama_cpp",
    "by_transformers",
    "divergence",
    "opened",
    "tokenize",
    "tokenizer_of",
]

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

Rows = list[np.ndarray]


def tokenizer_of(path: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(path)


def opened(path: Path) -> Any:
    """A dense model in float32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


def by_transformers(model: Any, prompts: list[list[int]]) -> Rows:
    """Log-probabilities of the token after each prompt."""
    with torch.no_grad():
        found = [model(torch.tensor([ids])).logits[0, -1] for ids in prompts]
    return [logits.double().log_softmax(-1).numpy() for logits in found]


def by_llama_cpp(path: Path, prompts: list[list[int]], adapters: Any = ()) -> Rows:
    """The same; llama.cpp adds a large vocabulary up in float32, so that is done again."""
    rows = log_probabilities(path, prompts, adapters)
    return [row - np.log(np.exp(row).sum()) for row in rows]


def apart(one: Rows, other: Rows) -> float:
    """The largest difference of a log-probability."""
    return max(float(np.abs(a - b).max()) for a, b in zip(one, other, strict=True))


def divergence(one: Rows, other: Rows) -> float:
    """Kullback and Leibler's, in nats: of the prompt where it is largest."""
    return max(float((np.exp(a) * (a - b)).sum()) for a, b in zip(one, other, strict=True))
