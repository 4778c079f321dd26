"""The scaling that each runtime applies to B A.

PEFT (Hu 2021; rsLoRA: Kalajdzievski 2023) takes alpha / r, or alpha / √r, with alpha and r of
the module. Others look at less.
"""

from __future__ import annotations

import math

from loraformat.model.adapter_facts import AdapterFacts, ModuleFacts
from loraformat.storage.foreign_json import is_finite

__all__ = ["as_trained", "by_config", "by_config_with_rslora", "by_file_alpha"]


def as_trained(adapter: AdapterFacts, module: ModuleFacts) -> float:
    """Return the scaling that the adapter was trained with.

    Examples
    --------
    >>> module = ModuleFacts("q_proj", 4, 8, 8, alpha=2.0, scaling=0.5)
    >>> as_trained(AdapterFacts("peft", (module,)), module)
    0.5
    """
    return module.scaling


def by_file_alpha(adapter: AdapterFacts, module: ModuleFacts) -> float:
    """Return llama.cpp's scaling: one alpha per file over the tensor's rank; 0 means 1.

    Examples
    --------
    >>> module = ModuleFacts("q_proj", 4, 8, 8, alpha=8.0, scaling=4.0)
    >>> by_file_alpha(AdapterFacts("peft", config_rank=4, config_alpha=8), module)
    2.0
    """
    if adapter.format != "peft":
        return module.scaling  # its reader reads it as llama.cpp does
    alpha = _number(adapter.config_alpha)
    return alpha / module.rank if alpha and module.rank else 1.0


def by_config(adapter: AdapterFacts, module: ModuleFacts) -> float:
    """Return the config's alpha / r for every module.

    Examples
    --------
    >>> module = ModuleFacts("q_proj", 4, 8, 8, alpha=8.0, scaling=4.0)
    >>> by_config(AdapterFacts("peft", config_rank=16, config_alpha=8), module)
    0.5
    """
    return _number(adapter.config_alpha) / _rank(adapter, module)


def by_config_with_rslora(adapter: AdapterFacts, module: ModuleFacts) -> float:
    """Return the config's alpha / r, or alpha / √r with rsLoRA, for every module.

    Examples
    --------
    >>> module = ModuleFacts("q_proj", 16, 8, 8, alpha=8.0, scaling=2.0)
    >>> facts = AdapterFacts("peft", config_rank=16, config_alpha=8, rslora=True)
    >>> by_config_with_rslora(facts, module)
    2.0
    """
    rank = _rank(adapter, module)
    return _number(adapter.config_alpha) / (math.sqrt(rank) if adapter.rslora else rank)


def _number(value: object) -> float:
    return float(value) if is_finite(value) else 8.0  # PEFT's default


def _rank(adapter: AdapterFacts, module: ModuleFacts) -> int:
    return adapter.config_rank or module.rank or 1
