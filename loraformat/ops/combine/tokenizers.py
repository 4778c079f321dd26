"""The tokenizer of a combination, and differences from those of the other adapters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from loraformat.model.adapter import Adapter
from loraformat.model.tokenizer_files import CarriedTokenizer
from loraformat.ops.check.prompts import same_template, token_numbers, tokenizer_change

__all__ = ["other_tokenizers"]

_WHOSE = "the first one's"


def other_tokenizers(adapters: Sequence[Adapter]) -> list[str]:
    """Return notes on adapters whose tokens, template or stop tokens differ from the first one's.

    The first gives its files to the result. A damaged tokenizer file is an InputError.
    """
    first = CarriedTokenizer(adapters[0].files, adapters[0].path)
    notes = []
    for adapter in adapters[1:]:
        own = CarriedTokenizer(adapter.files, adapter.path)
        changes = list(_changes(own, first))
        if changes:
            notes.append(
                f"{adapter.path}: {'; '.join(changes)}; the tokenizer files are those of "
                f"{adapters[0].path}: to keep the others, list {adapter.path} first"
            )
    return notes


def _changes(own: CarriedTokenizer, first: CarriedTokenizer) -> Iterator[str]:
    if token_numbers(own) and not token_numbers(first):
        yield "has a tokenizer, but the first one has none"
    elif change := tokenizer_change(own, first, _WHOSE):
        yield change
    here, there = (one.chat_templates.get("default") for one in (own, first))
    if here is not None and there is None:
        yield "has a chat template, but the first one has none"
    elif here is not None and there is not None and not same_template(here, there):
        yield f"its chat template differs from {_WHOSE}"
    if own.stops and set(own.stops) != set(first.stops):
        yield f"its texts end with the tokens {', '.join(map(str, own.stops))}"
