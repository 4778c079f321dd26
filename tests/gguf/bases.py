"""Tiny models with the small model's tokenizer, and what transformers computes with them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llama_runtime import embeddings, log_probabilities
from loraformat_converters.gguf.architectures import ARCHITECTURES

import loraformat.demo
from tests import tiny_models
from tests.tiny_models import auto_class, model_type

SMALL = Path(loraformat.demo.__file__).parent / "small_model"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
#: Longer than the windows and original contexts of the tiny models.
PROMPTS = [[0, *range(40, 70)], [5, 9, *range(300, 340)]]
#: GELU is a table of float16 in llama.cpp.
GELU = ("gemma2", "gemma3", "gemma3_text", "gpt2", "bert")


#: Hyperparameters of tiny models that GGUF knows, with the vocabulary of the small model.
MODELS = {
    name: tiny_models.resized(name, vocab_size=2048)
    for name in tiny_models.ARCHITECTURES
    if any(model_type(name) in record.models for record in ARCHITECTURES.values())
    and name != "mistral-window"  # llama.cpp has windows for other architectures only
}


def make_model(name: str, directory: Path, **changes: Any) -> Path:
    return tiny_models.make_model(name, directory, MODELS[name], **changes)


def tolerance(name: str) -> float:
    """How far apart log-probabilities (of bert hidden states) may be."""
    return 5e-3 if model_type(name) in GELU else 1e-5


def make_base(name: str, directory: Path, **changes: Any) -> Path:
    make_model(name, directory, **changes)
    for file in TOKENIZER:
        shutil.copy(SMALL / file, directory / file)
    return directory


def by_transformers(path: Path, name: str, prompts=PROMPTS) -> list[np.ndarray]:
    """Log-probabilities after each prompt, or bert's hidden states, in float32."""
    model = auto_class(name).from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    return run(model.eval(), name, prompts)


def run(model, name: str, prompts=PROMPTS) -> list[np.ndarray]:
    found = []
    with torch.no_grad():
        for prompt in prompts:
            output = model(torch.tensor([prompt]))
            if name == "bert":
                found.append(output.last_hidden_state[0].double().numpy())
            else:
                found.append(output.logits[0, -1].double().log_softmax(-1).numpy())
    return found


def by_llama_cpp(path: Path, name: str, prompts=PROMPTS) -> list[np.ndarray]:
    """The same by llama.cpp."""
    return embeddings(path, prompts) if name == "bert" else list(log_probabilities(path, prompts))


def apart(one: list[np.ndarray], other: list[np.ndarray]) -> float:
    """Return the largest difference."""
    return max(float(np.abs(a - b).max()) for a, b in zip(one, other, strict=True))
