"""Cards of converted weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

from loraformat.card.document import own_words, without_facts
from loraformat.card.front_matter import split
from loraformat.errors import InputError
from loraformat.model.checkpoint import CarriedFile
from loraformat.storage.safe_paths import CARD_NAME

__all__ = ["base_model_of", "keep_user_text", "with_true_card"]

_MAX_CARD_BYTES = 4 << 20


def base_model_of(files: Iterable[CarriedFile]) -> str | None:
    """Return the ``base_model`` of the card among files beside weights; None if it has none."""
    card = next((file for file in files if file.path == CARD_NAME), None)
    text = None if card is None else _text(card)
    if text is None:
        return None
    try:
        named = split(text)[0].get("base_model")
    except InputError:
        return None
    first = named[0] if isinstance(named, list) and named else named
    return first if isinstance(first, str) and first else None


def with_true_card(files: Iterable[CarriedFile]) -> tuple[CarriedFile, ...]:
    """Return files in which the card keeps user text but no facts of the old weights."""
    return _with_card(files, without_facts)


def keep_user_text(files: Iterable[CarriedFile]) -> tuple[CarriedFile, ...]:
    """Return the files of a base, with its card reduced to the user text if it has any.

    What is made of a bundle is another thing: its card, with sizes and hashes, would be untrue.
    """
    return _with_card(files, own_words)


def _with_card(
    files: Iterable[CarriedFile], rewrite: Callable[[str], str | None]
) -> tuple[CarriedFile, ...]:
    """Return files with a rewritten card, without it where `rewrite` returns None."""
    kept = []
    for file in files:
        text = _text(file) if file.path == CARD_NAME else None
        words = None if text is None else rewrite(text)
        if text is None or words == text:
            kept.append(file)
        elif words is not None:
            data = words.encode("utf-8")
            kept.append(CarriedFile(file.path, len(data), partial(bytes, data)))
    return tuple(kept)


def _text(file: CarriedFile) -> str | None:
    """Return a card's text; None if it is not text or too long."""
    if file.nbytes > _MAX_CARD_BYTES:
        return None
    try:
        return file.read().decode("utf-8")
    except UnicodeDecodeError:
        return None
