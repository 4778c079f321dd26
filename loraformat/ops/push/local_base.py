"""A base that is on this machine already, to hold an adapter against before it is published."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from loraformat.card import Base
from loraformat.hub.source import cached

__all__ = ["NearBase", "near_base"]


@dataclass(frozen=True, slots=True)
class NearBase:
    """A base.

    Attributes
    ----------
    path : str or Path
    word : str
        What a user would call it on the command line.
    """

    path: str | Path
    word: str


def near_base(given: str | None, named: str | None, base: Base) -> NearBase | None:
    """Return the base that the user names, else one that needs no download.

    Parameters
    ----------
    given : str or None
        ``--base``.
    named : str or None
        What the adapter's config names, a local path perhaps.
    base : Base
        On the Hub; its cache may have it, or no more than its config.
    """
    if given is not None:
        return NearBase(given, given)
    if named is not None and Path(named).is_dir():
        return NearBase(named, named)
    found = cached(base.repo, base.revision)
    at = f"@{base.revision}" if base.revision else ""
    return None if found is None else NearBase(found, f"{base.repo}{at}")
