"""Cards of converted weights."""

from __future__ import annotations

from collections.abc import Iterable

from loraformat.card.document import own_words, without_facts
from loraformat.card.front_matter import split
from loraformat.errors import InputError
from loraformat.model.checkpoint import CarriedFile
from loraformat.storage.reserved_names import CARD_NAME

__all__ = ["base_model_of", "keep_user_text", "with_true_card"]

_MAX_CARD_BYTES = 4 << 20


def base_model_of(files: Iterable[CarriedFile]) -> str | None:
    """Return the ``base_model`` of a card; None if it has none.

    Parameters
    ----------
    files : iterable of CarriedFile
        Those beside the weights.
    """
    for file in files:
        text = _text(file) if file.path == CARD_NAME else None
        if text is None:
            continue
        try:
            named = split(text)[0].get("base_model")
        except InputError:
            return None
        first = named[0] if isinstance(named, list) and named else named
        return first if isinstance(first, str) and first else None
    return None


def with_true_card(files: Iterable[CarriedFile]) -> tuple[CarriedFile, ...]:
    """Return files in which the card keeps user text but no facts of the old weights.

    Parameters
    ----------
    files : iterable of CarriedFile
        Those of the weights that are replaced.
    """
    return tuple(_true(file) if file.path == CARD_NAME else file for file in files)


def keep_user_text(files: Iterable[CarriedFile]) -> tuple[CarriedFile, ...]:
    """Return the files of a base, with its card reduced to the user text if it has any.

    What is made of a bundle is another thing: its card, with sizes and hashes, would be untrue.

    Parameters
    ----------
    files : iterable of CarriedFile
    """
    kept = []
    for file in files:
        text = _text(file) if file.path == CARD_NAME else None
        words = None if text is None else own_words(text)
        if text is None or words == text:
            kept.append(file)
        elif words is not None:
            kept.append(_of_text(file.path, words))
    return tuple(kept)


def _true(file: CarriedFile) -> CarriedFile:
    written = _text(file)
    kept = None if written is None else without_facts(written)
    return file if kept is None or kept == written else _of_text(file.path, kept)


def _text(file: CarriedFile) -> str | None:
    """Return a card's text; None if it is not text or too long."""
    if file.nbytes > _MAX_CARD_BYTES:
        return None
    try:
        return file.read().decode("utf-8")
    except UnicodeDecodeError:
        return None


def _of_text(path: str, text: str) -> CarriedFile:
    data = text.encode("utf-8")
    return CarriedFile(path, len(data), lambda: data)
