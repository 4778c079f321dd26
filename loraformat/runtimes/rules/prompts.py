"""Rules about tokenizers and chat templates."""

from __future__ import annotations

from loraformat.model.adapter_facts import AdapterFacts
from loraformat.runtimes.record import Rule, Runtime, caution

__all__ = ["PROMPT_RULES"]


def _tokenizer(adapter: AdapterFacts, runtime: Runtime) -> str | None:
    return adapter.tokenizer_change


def _template(adapter: AdapterFacts, runtime: Runtime) -> str | None:
    return adapter.template_change


PROMPT_RULES = (
    Rule(
        "TOKENIZER_CHANGED",
        "a tokenizer that differs from the base's",
        _tokenizer,
        caution(
            "the base's tokenizer is used, so token ids differ from training",
            "advice",
            "replace the base's tokenizer files with the adapter's",
        ),
    ),
    Rule(
        "CHAT_TEMPLATE_CHANGED",
        "a chat template that differs from the base's",
        _template,
        caution(
            "the base's chat template is used, so prompts differ from training",
            "advice",
            "replace the base's chat template with the adapter's",
        ),
    ),
)
