"""Cards that travel with an adapter whose weights were written anew."""

from __future__ import annotations

from collections.abc import Iterable

from loraformat.card.document import without_facts
from loraformat.checkpoint import CarriedFile
from loraformat.manifest import CARD_NAME

__all__ = ["with_true_card"]

_MAX_CARD_BYTES = 4 << 20


def with_true_card(files: Iterable[CarriedFile]) -> tuple[CarriedFile, ...]:
    """Return files whose card keeps people's words, and no facts of the weights that were.

    Parameters
    ----------
    files : iterable of CarriedFile
        Those of the weights that are replaced.
    """
    return tuple(_true(file) if file.path == CARD_NAME else file for file in files)


def _true(file: CarriedFile) -> CarriedFile:
    if file.nbytes > _MAX_CARD_BYTES:
        return file
    try:
        written = file.read().decode("utf-8")
    except UnicodeDecodeError:
        return file
    kept = without_facts(written)
    if kept == written:
        return file
    data = kept.encode("utf-8")
    return CarriedFile(file.path, len(data), lambda: data)
