"""GGUF's names of model types, where they differ from transformers'."""

from __future__ import annotations

__all__ = ["gguf_architecture"]

_OTHER_NAMES = {
    "mistral": "llama",
    "mixtral": "llama",
    "gemma3_text": "gemma3",
    "qwen3_moe": "qwen3moe",
    "qwen2_moe": "qwen2moe",
}


def gguf_architecture(model_type: str | None) -> str | None:
    """Return what GGUF calls the architecture of a model type; None if no type is known.

    Examples
    --------
    >>> gguf_architecture("mistral"), gguf_architecture("qwen2"), gguf_architecture(None)
    ('llama', 'qwen2', None)
    """
    return None if model_type is None else _OTHER_NAMES.get(model_type, model_type)
