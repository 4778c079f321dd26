"""Whether an adapter was made for a base: a comparison of two fingerprints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from loraformat.errors import printable

__all__ = ["BaseMatch", "compare_fingerprints"]


@dataclass(frozen=True, slots=True)
class BaseMatch:
    """How the base that an adapter was made for relates to another base.

    Attributes
    ----------
    relation : {"same", "unknown", "descends", "other"}
        ``descends``: this base was converted or merged from the one that the adapter was made
        for, so that its values may be rounded otherwise. ``unknown``: one of the two has no
        fingerprint.
    made_for : str or None
        Fingerprint that the adapter records.
    here : str or None
        Fingerprint of this base, or of the bundle that it descends from.
    descends : bool
        ``here`` is the latter.
    """

    relation: Literal["same", "unknown", "descends", "other"]
    made_for: str | None
    here: str | None
    descends: bool = False

    @property
    def difference(self) -> str:
        """The difference as a sentence whose subject is the adapter."""
        this = "was made of" if self.descends else "is"
        return f"was made for the base {printable(self.made_for)}, and this one {this} {self.here}"


def compare_fingerprints(
    made_for: str | None, here: str | None, *, descends: bool = False
) -> BaseMatch:
    """Compare what an adapter records of its base with a base.

    Parameters
    ----------
    made_for, here : str or None
    descends : bool
        ``here`` is of the bundle that this base was made from, not its own.

    Examples
    --------
    >>> compare_fingerprints("ab12", "ab12").relation, compare_fingerprints(None, "ab12").relation
    ('same', 'unknown')
    >>> compare_fingerprints("ab12", "cd34").difference
    'was made for the base ab12, and this one is cd34'
    """
    if made_for is None or here is None:
        relation: Literal["same", "unknown", "descends", "other"] = "unknown"
    elif made_for != here:
        relation = "other"
    else:
        relation = "descends" if descends else "same"
    return BaseMatch(relation, made_for, here, descends)
