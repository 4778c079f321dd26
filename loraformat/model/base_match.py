"""Whether an adapter was made for a base: a comparison of two fingerprints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from loraformat.errors import printable

__all__ = ["BaseMatch"]


@dataclass(frozen=True, slots=True)
class BaseMatch:
    """How the base that an adapter was made for relates to another base.

    Attributes
    ----------
    made_for : str or None
        Fingerprint that the adapter records.
    here : str or None
        Fingerprint of this base, or of the bundle that it descends from.
    descends : bool
        ``here`` is the latter.

    Examples
    --------
    >>> BaseMatch("ab12", "ab12").relation, BaseMatch(None, "ab12").relation
    ('same', 'unknown')
    >>> BaseMatch("ab12", "cd34").difference
    'was made for the base ab12, and this one is cd34'
    """

    made_for: str | None
    here: str | None
    descends: bool = False

    @property
    def relation(self) -> Literal["same", "unknown", "descends", "other"]:
        """The relation; ``unknown`` where one of the two has no fingerprint.

        ``descends``: this base was converted or merged from the one that the adapter was made for,
        so that its values may be rounded otherwise.
        """
        if self.made_for is None or self.here is None:
            return "unknown"
        if self.made_for != self.here:
            return "other"
        return "descends" if self.descends else "same"

    @property
    def difference(self) -> str:
        """The difference as a sentence whose subject is the adapter."""
        this = "was made of" if self.descends else "is"
        return f"was made for the base {printable(self.made_for)}, and this one {this} {self.here}"
