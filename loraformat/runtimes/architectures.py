"""GGUF architecture names of model types, and their limits."""

from __future__ import annotations

from loraformat.model.adapter_facts import AdapterFacts

__all__ = ["GGUF_NAMES", "HEADLESS", "gguf_architecture", "merges_into_gguf"]

#: Generating architectures of llama.cpp whose head is the embedding, whatever the file holds.
HEADLESS = {"gemma2"}
_ENDS = ("lm_head", "embed_tokens")

#: Where llama.cpp calls an architecture otherwise than transformers its model type.
GGUF_NAMES = {
    "mistral": "llama",
    "mixtral": "llama",
    "gemma3_text": "gemma3",
    "qwen3_moe": "qwen3moe",
    "qwen2_moe": "qwen2moe",
}


def gguf_architecture(model_type: str | None) -> str | None:
    """Return the GGUF architecture of a model type; None if unknown.

    Examples
    --------
    >>> gguf_architecture("mistral"), gguf_architecture("qwen2"), gguf_architecture(None)
    ('llama', 'qwen2', None)
    """
    return None if model_type is None else GGUF_NAMES.get(model_type, model_type)


def merges_into_gguf(adapter: AdapterFacts) -> bool:
    """Tell whether llama.cpp supports the output head of the merged model.

    Examples
    --------
    >>> from loraformat.model.adapter_facts import BaseFacts, ModuleFacts
    >>> head = ModuleFacts("lm_head", 8, 64, 1000, 8.0, 1.0)
    >>> for name in ("gemma2", "gemma3"):
    ...     base = BaseFacts(tied=True, gguf_architecture=name)
    ...     print(merges_into_gguf(AdapterFacts("peft", (head,), base=base)))
    False
    True
    """
    if adapter.base is None or adapter.base.gguf_architecture not in HEADLESS:
        return True
    changed = [*adapter.leaves, *(name.removesuffix(".weight") for name in adapter.replaced)]
    return not any(name.endswith(_ENDS) for name in changed)
