"""Adapters that PEFT is known to load, without importing it.

Asking takes seconds. Nothing can go wrong with pairs of factors, all of one rank, for linears
inside the layers of a class that has its weights in memory as they are stored.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from loraformat.families.table import family_of
from loraformat.families.tensor_names import layer_of
from loraformat.model.base_names import BaseNames
from loraformat_converters.peft.keys import PREFIX
from loraformat_converters.peft.load_on_meta import Stored

__all__ = ["is_plain"]

#: Fields without a say in what is loaded. Every other one that is not checked must be empty.
_IRRELEVANT = {
    "base_model_name_or_path", "inference_mode", "init_lora_weights", "megatron_core",
    "qalora_group_size", "revision",
}  # fmt: skip
_FACTOR = re.compile(rf"{re.escape(PREFIX)}(?P<module>.+)\.lora_(?P<part>[AB])\.weight")
_VERSION = re.compile(r"\d+(\.\d+)*(\.dev\d+)?")
_DTYPES = ("F32", "F16", "BF16")


def is_plain(
    config: Mapping[str, Any],
    tensors: Mapping[str, Stored],
    base: Mapping[str, Any],
    names: BaseNames,
) -> bool:
    """Tell whether PEFT is known to load an adapter with all its tensors."""
    return (
        names.as_stored
        and not family_of(base).conv1d
        and _says_nothing_special(config)
        and _are_linears(config["target_modules"], names.shapes)
        and _are_pairs(config["r"], config["target_modules"], tensors, names.shapes)
    )


def _says_nothing_special(config: Mapping[str, Any]) -> bool:
    rank, targets = config.get("r"), config.get("target_modules")
    alpha, dropout = config.get("lora_alpha", 8), config.get("lora_dropout", 0)
    checked = {
        "peft_type": config.get("peft_type") == "LORA",
        "task_type": config.get("task_type") in ("CAUSAL_LM", None),
        "bias": config.get("bias", "none") == "none",
        "r": type(rank) is int and rank > 0,
        "lora_alpha": type(alpha) in (int, float),
        "lora_dropout": type(dropout) in (int, float) and 0 <= dropout < 1,
        "use_rslora": type(config.get("use_rslora", False)) is bool,
        "peft_version": _VERSION.fullmatch(str(config.get("peft_version", 0))) is not None,
        "target_modules": isinstance(targets, list)
        and all(type(target) is str and "." not in target for target in targets),
    }
    others = config.keys() - checked.keys() - _IRRELEVANT
    return all(checked.values()) and not any(config[field] for field in others)


def _are_linears(targets: list[str], shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Tell whether every possible target of PEFT is a linear in some layer."""
    for name, shape in shapes.items():
        *place, module, leaf = ("", *name.split("."))
        is_linear = leaf == "bias" or (leaf == "weight" and len(shape) == 2)
        if module in targets and not (is_linear and layer_of(name)):
            return False
        if not set(targets).isdisjoint((*place, leaf)):
            return False
    return True


def _are_pairs(
    rank: int,
    targets: list[str],
    tensors: Mapping[str, Stored],
    shapes: Mapping[str, tuple[int, ...]],
) -> bool:
    parts: dict[str, str] = {}
    for name, tensor in tensors.items():
        found = _FACTOR.fullmatch(name)
        shape = shapes.get(f"{found['module']}.weight", ()) if found else ()
        if found is None or found["module"].rpartition(".")[2] not in targets or len(shape) != 2:
            return False
        wanted = (rank, shape[1]) if found["part"] == "A" else (shape[0], rank)
        if tensor.shape != wanted or tensor.dtype not in _DTYPES:
            return False
        parts[found["module"]] = parts.get(found["module"], "") + found["part"]
    return bool(parts) and all(len(part) == 2 for part in parts.values())
