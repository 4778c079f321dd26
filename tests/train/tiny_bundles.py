"""Tiny models as bundles, and the dense model that each stands for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from loraformat.ops.convert.convert import convert
from tests.tiny_models import make_model


def make(directory: Path, architecture: str = "llama", **options: Any) -> Path:
    """Write a bundle of a tiny model, and return its path.

    ``directory/dense`` is what it was quantized from, ``directory/stored`` the dense float32
    model whose weights are exactly those that the bundle's codes stand for.
    """
    make_model(architecture, directory / "dense")
    convert(directory / "dense", directory / "bundle", **options)
    convert(directory / "bundle", directory / "stored", to_format="safetensors", dtype="f32")
    return directory / "bundle"


def stored_model(bundle: Path, attention: str = "eager") -> Any:
    """Return the dense float32 model that a bundle stands for, in evaluation mode."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        bundle.parent / "stored", dtype=torch.float32, attn_implementation=attention,
        experts_implementation="eager",
    )  # fmt: skip
    return model.eval().requires_grad_(False)
