"""QLoRA on memory-mapped shards: an adapter trained against a bundle that stays on disk.

The names below are loaded on first use; this is the only package that needs transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loraformat.train.batch import Batch as Batch
    from loraformat.train.lora.options import LoraOptions as LoraOptions
    from loraformat.train.model import TrainableModel as TrainableModel
    from loraformat.train.opening import load as load
    from loraformat.train.run.compare import evaluate as evaluate
    from loraformat.train.run.options import TrainOptions as TrainOptions
    from loraformat.train.run.verb import train as train

_HOMES = {
    "Batch": ("loraformat.train.batch", "Batch"),
    "LoraOptions": ("loraformat.train.lora.options", "LoraOptions"),
    "TrainOptions": ("loraformat.train.run.options", "TrainOptions"),
    "TrainableModel": ("loraformat.train.model", "TrainableModel"),
    "evaluate": ("loraformat.train.run.compare", "evaluate"),
    "load": ("loraformat.train.opening", "load"),
    "train": ("loraformat.train.run.verb", "train"),
}

__all__ = [
    "Batch",
    "LoraOptions",
    "TrainOptions",
    "TrainableModel",
    "evaluate",
    "load",
    "train",
]


def __getattr__(name: str) -> Any:
    try:
        module, attribute = _HOMES[name]
    except KeyError:
        raise AttributeError(f"module 'loraformat.train' has no attribute {name!r}") from None
    return getattr(import_module(module), attribute)
