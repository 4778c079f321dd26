"""QLoRA on memory-mapped shards: an adapter trained against a bundle that stays on disk.

In which order to read: `batch` (what a step computes on), `engine` (the base, layer by layer),
`lora` (the adapter), `model` and `opening` (both together), `data`, `loop`, `run`.

The names below are loaded on first use; this is the only package that needs transformers.

OpenMP's threads spin while they wait, unless ``OMP_WAIT_POLICY`` says otherwise before torch is
imported. Importing this package says so, as loraformat's commands do, if it comes before torch and
the variable is not set.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if "torch" not in sys.modules:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if TYPE_CHECKING:
    from loraformat.training.batch import Batch as Batch
    from loraformat.training.loop.optimizer import parameter_groups as parameter_groups
    from loraformat.training.lora.options import LoraOptions as LoraOptions
    from loraformat.training.model import TrainableModel as TrainableModel
    from loraformat.training.opening import load as load

_HOMES = {
    "Batch": ("loraformat.training.batch", "Batch"),
    "LoraOptions": ("loraformat.training.lora.options", "LoraOptions"),
    "TrainableModel": ("loraformat.training.model", "TrainableModel"),
    "load": ("loraformat.training.opening", "load"),
    "parameter_groups": ("loraformat.training.loop.optimizer", "parameter_groups"),
}

__all__ = [
    "Batch",
    "LoraOptions",
    "TrainableModel",
    "load",
    "parameter_groups",
]


def __getattr__(name: str) -> Any:
    try:
        module, attribute = _HOMES[name]
    except KeyError:
        raise AttributeError(f"module 'loraformat.training' has no attribute {name!r}") from None
    return getattr(import_module(module), attribute)
