"""A base as a transformers model on the ``meta`` device, without weights.

The class is the one that ``architectures`` names: that which ``from_pretrained`` of a user's
program opens, and whose names PEFT has. No code is ever taken from the model's directory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loraformat.families.model_class import names_base_class

__all__ = ["TASKS", "build_on_meta", "task_of"]

#: PEFT's word for a task, and transformers' mapping to the class that has its head. Of such a model
#: the config names the class only once it was saved.
TASKS = {
    "CAUSAL_LM": "MODEL_FOR_CAUSAL_LM_MAPPING",
    "FEATURE_EXTRACTION": "MODEL_MAPPING",
    "QUESTION_ANS": "MODEL_FOR_QUESTION_ANSWERING_MAPPING",
    "SEQ_CLS": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "TOKEN_CLS": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING",
}

_REMOTE = ("auto_map", "quantization_config")
#: A stranger's config may ask for any number of modules, each of which costs memory.
_MOST_MODULES = 4096
_COUNTS = ("layer", "block", "depth", "expert", "stage")
_SIZES = ("size", "dim", "tokens", "capacity", "rank")
_DEEPEST = 8


def task_of(config: Mapping[str, Any], task: Any) -> str | None:
    """Return the task whose model class replaces the one in the config; None if none does.

    An adapter of an embedding model names the modules of ``AutoModel``'s class, whatever class
    the checkpoint was saved from; one that generates those of the class with a head.

    Examples
    --------
    >>> task_of({"architectures": ["Qwen3ForCausalLM"]}, "FEATURE_EXTRACTION")
    'FEATURE_EXTRACTION'
    >>> task_of({"architectures": ["Qwen3Model"]}, "FEATURE_EXTRACTION") is None
    True
    """
    other = {True: "CAUSAL_LM", False: "FEATURE_EXTRACTION"}[names_base_class(config)]
    return other if task == other else None


def build_on_meta(config: Mapping[str, Any], *, task: str | None = None, labels: int = 2) -> Any:
    """Build the model of a config, with all of its parameters and buffers on ``meta``.

    With `task`, one of `TASKS`, its class is the one with the head of that task, of so many
    `labels`, instead of the one that is named. None if transformers is not installed, has no class
    for it, cannot build it, or if the config asks for thousands of layers or experts.
    """
    try:
        import torch
        import transformers
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    except ImportError:
        return None
    fields = {key: value for key, value in config.items() if key not in _REMOTE}
    model_type = fields.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING or _is_huge(fields):
        return None
    try:
        made = CONFIG_MAPPING[model_type].from_dict(fields)
        if task is None:
            model_class = _class(transformers, fields.get("architectures"), made)
        else:
            model_class = getattr(transformers, TASKS[task]).get(type(made), None)
            made.num_labels = labels
        if model_class is None:
            return None
        with torch.device("meta"):
            return model_class._from_config(made).eval()
    except Exception:  # a stranger's config may fail in any way: then nothing is known of it
        return None


def _class(transformers: Any, architectures: Any, config: Any) -> Any:
    """Return the transformers class of a name, or the causal language-model class."""
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    found = getattr(transformers, name, None) if isinstance(name, str) else None
    if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
        return found
    return transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)


def _is_huge(value: Any, key: str = "", depth: int = 0) -> bool:
    if depth > _DEEPEST:
        return True
    if isinstance(value, Mapping):
        return any(_is_huge(inner, str(name), depth + 1) for name, inner in value.items())
    if isinstance(value, list):
        long = len(value) > _MOST_MODULES and _counts(key)
        return long or any(_is_huge(one, key, depth + 1) for one in value)
    return type(value) is int and value > _MOST_MODULES and _counts(key)


def _counts(key: str) -> bool:
    return any(word in key for word in _COUNTS) and not key.endswith(_SIZES)
