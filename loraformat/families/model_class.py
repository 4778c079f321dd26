"""Whether the model class in ``config.json`` has a language-model head."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

__all__ = ["base_class", "names_base_class", "names_language_head"]

_LANGUAGE_HEADS = ("LMHead", "CausalLM", "ConditionalGeneration")


def base_class(named: str) -> str:
    """Return the headless class that belongs to a language-model class.

    Examples
    --------
    >>> base_class("Qwen3ForCausalLM"), base_class("GPT2LMHeadModel")
    ('Qwen3Model', 'GPT2Model')
    """
    return re.sub(r"(ForCausalLM|LMHeadModel|ForConditionalGeneration)$", "Model", named)


def names_language_head(config: Mapping[str, Any]) -> bool:
    """Tell whether a config names a class with a language-model head.

    Examples
    --------
    >>> names_language_head({"architectures": ["GPT2LMHeadModel"]})
    True
    """
    return any(mark in _named(config) for mark in _LANGUAGE_HEADS)


def names_base_class(config: Mapping[str, Any]) -> bool:
    """Tell whether a config names a class without a head.

    Examples
    --------
    >>> names_base_class({"architectures": ["LlamaModel"]})
    True
    >>> names_base_class({"architectures": ["GPT2LMHeadModel"]})
    False
    """
    return _named(config).endswith("Model") and not names_language_head(config)


def _named(config: Mapping[str, Any]) -> str:
    classes = config.get("architectures")
    return str(classes[0]) if isinstance(classes, list) and classes else ""
