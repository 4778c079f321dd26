"""Rules about an adapter's files, and those of its tokenizer."""

from __future__ import annotations

from loraformat.errors import printable
from loraformat.model.adapter_facts import AdapterFacts
from loraformat.runtimes.record import Rule, Runtime, caution, refuses, unknown

__all__ = ["FILE_RULES", "PROMPT_RULES"]

_ORDINARY = {"F32", "F16", "BF16"}


def _names(adapter: AdapterFacts, runtime: Runtime) -> str | None:
    if not adapter.odd_names or runtime.has_proof(adapter):
        return None
    return (
        f"{len(adapter.odd_names)} tensors have names that PEFT does not use "
        f"({printable(adapter.odd_names[0])})"
    )


def _dtype(adapter: AdapterFacts, runtime: Runtime) -> str | None:
    odd = {dtype for module in adapter.modules for dtype in module.dtypes} - _ORDINARY
    return f"factors are {', '.join(sorted(odd))}" if odd and adapter.format == "peft" else None


FILE_RULES = (
    Rule("KEY_PREFIX", "names other than `base_model.model.MODULE.lora_A.weight`", _names),
    Rule(
        "SHARDED",
        "`adapter_model.safetensors.index.json`",
        lambda adapter, _: "its tensors are in shards with an index" if adapter.sharded else None,
        refuses("every loader expects a single adapter_model.safetensors", "rewrite"),
        of_files=True,
    ),
    Rule(
        "OTHER_WEIGHTS",
        "`non_lora_trainables.bin` and other weight files in its directory",
        lambda adapter, _: (
            f"{printable(adapter.beside[0])} is in the same directory" if adapter.beside else None
        ),
        caution(
            "adapter loaders do not read such a file, which may contain other trained weights",
            "advice",
            "load it with the program that wrote it",
        ),
    ),
    Rule(
        "DTYPE",
        "factors of a dtype other than F32, F16, BF16",
        _dtype,
        unknown("only F32, F16 and BF16 were checked", "retype"),
        of_files=True,
    ),
)

PROMPT_RULES = (
    Rule(
        "TOKENIZER_CHANGED",
        "a tokenizer that differs from the base's",
        lambda adapter, _: adapter.tokenizer_change,
        caution(
            "the base's tokenizer is used, so token ids differ from training",
            "advice",
            "replace the base's tokenizer files with the adapter's",
        ),
    ),
    Rule(
        "CHAT_TEMPLATE_CHANGED",
        "a chat template that differs from the base's",
        lambda adapter, _: adapter.template_change,
        caution(
            "the base's chat template is used, so prompts differ from training",
            "advice",
            "replace the base's chat template with the adapter's",
        ),
    ),
)
