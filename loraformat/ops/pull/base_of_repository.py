"""Which base a pulled repository names: in its adapter, or on its card."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from loraformat.errors import LoraFormatError
from loraformat.hub import hub_id
from loraformat.ops.opening.adapter import open_adapter
from loraformat.ops.push.base_model import BaseRef, adapter_base

__all__ = ["base_named_by"]


def base_named_by(path: Path | None, card: Mapping[str, object]) -> BaseRef | None:
    """Return the base as ``org/name`` and a revision, if one is named.

    Parameters
    ----------
    path : Path or None
        Where the repository lies now; None if it was not fetched.
    card : mapping
        Front matter of its card.
    """
    said = _card_base(card)
    found = None if path is None else _adapter_base(path)
    return found or ((said, None) if said else None)


def _card_base(card: Mapping[str, object]) -> str | None:
    said = card.get("base_model")
    if isinstance(said, list) and len(said) == 1:
        said = said[0]
    named = hub_id(said) if isinstance(said, str) else None
    return named[0] if named else None


def _adapter_base(path: Path) -> BaseRef | None:
    try:
        with open_adapter(path, conditional=True, inspect=True) as adapter:
            repo, revision = adapter_base(adapter, None, None)
    except LoraFormatError:  # no adapter, or a damaged one, which can be fetched all the same
        return None
    # A stranger's word for a revision: a commit is one, and a branch is not what it was.
    return repo, revision if revision and re.fullmatch(r"[0-9a-f]{40}", revision) else None
