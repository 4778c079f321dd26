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
    from loraformat.train.batch import Batch as Batch
    from loraformat.train.loop.optimizer import parameter_groups as parameter_groups
    from loraformat.train.lora.options import LoraOptions as LoraOptions
    from loraformat.train.model import TrainableModel as TrainableModel
    from loraformat.train.opening import load as load

_HOMES = {
    "Batch": ("loraformat.train.batch", "Batch"),
    "LoraOptions": ("loraformat.train.lora.options", "LoraOptions"),
    "TrainableModel": ("loraformat.train.model", "TrainableModel"),
    "load": ("loraformat.train.opening", "load"),
    "parameter_groups": ("loraformat.train.loop.optimizer", "parameter_groups"),
}

__all__ = ["Batch", "LoraOptions", "TrainableModel", "load", "parameter_groups"]


def __getattr__(name: str) -> Any:
    try:
        module, attribute = _HOMES[name]
    except KeyError:
        raise AttributeError(f"module 'loraformat.train' has no attribute {name!r}") from None
    return getattr(import_module(module), attribute)
