"""Rules about what stands before an adapter: the tokens that it was trained on."""

from __future__ import annotations

from loraformat.model.adapter_facts import AdapterFacts
from loraformat.runtimes.record import Rule, Runtime, mind

__all__ = ["PROMPT_RULES"]


def _tokenizer(adapter: AdapterFacts, runtime: Runtime) -> str | None:
    return adapter.tokenizer_change


def _template(adapter: AdapterFacts, runtime: Runtime) -> str | None:
    return adapter.template_change


PROMPT_RULES = (
    Rule(
        "TOKENIZER_CHANGED",
        "a tokenizer beside it that is not the base's",
        _tokenizer,
        mind(
            "the base's tokenizer is used, which makes other numbers of a text than in training",
            "advice",
            "put its tokenizer files in the place of the base's",
        ),
    ),
    Rule(
        "CHAT_TEMPLATE_CHANGED",
        "a chat template beside it that is not the base's",
        _template,
        mind(
            "the base's chat template is used, which prompts otherwise than in training",
            "advice",
            "put its chat template in the place of the base's",
        ),
    ),
)
