"""Where in a transformers model its decoder layers and its head are."""

from __future__ import annotations

from typing import Any

import torch

from loraformat.errors import UnsupportedError, printable
from loraformat.train.engine.experts import ExpertStack
from loraformat.train.engine.linear import FrozenLinear
from loraformat.train.engine.meta_model import text_config

__all__ = ["decoder_of", "find_layers", "head_name", "number_layers"]


def decoder_of(model: Any) -> Any:
    """Return the part of a causal language model that turns tokens into hidden states."""
    found = model.get_decoder()
    if found is not model and found is not model.get_output_embeddings():
        return found  # ModernBERT calls its head the decoder
    from transformers import PreTrainedModel

    return next((m for m in model.children() if isinstance(m, PreTrainedModel)), model)


def find_layers(model: Any, path: object) -> tuple[str, list[torch.nn.Module]]:
    """Return the name of the list of decoder layers, and the layers.

    Raises
    ------
    UnsupportedError
        If the decoder has no list of as many modules as its config says it has layers.
    """
    decoder, count = decoder_of(model), text_config(model.config).num_hidden_layers
    lists = [
        (name, list(module))
        for name, module in decoder.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == count
    ]
    if not lists:
        raise UnsupportedError(
            f"{printable(type(model).__name__)} has no list of its {count} decoder layers",
            path=f"{path}",
        )
    name, layers = min(lists, key=lambda found: found[0].count("."))
    prefix = next((n for n, module in model.named_modules() if module is decoder), "")
    return ".".join(part for part in (prefix, name) if part), layers


def number_layers(model: Any, path: object) -> None:
    """Tell each linear and each stack of experts of the decoder which layer it stands in."""
    for number, layer in enumerate(find_layers(model, path)[1]):
        for module in layer.modules():
            if isinstance(module, FrozenLinear | ExpertStack):
                module.layer = number


def head_name(model: Any, path: object) -> str:
    """Return the name of the output head.

    Raises
    ------
    UnsupportedError
        If the model has none.
    """
    head = model.get_output_embeddings()
    names: list[str] = [name for name, module in model.named_modules() if module is head]
    if head is not None and names:
        return names[0]
    raise UnsupportedError(
        f"{printable(type(model).__name__)} has no output head to train with", path=f"{path}"
    )
