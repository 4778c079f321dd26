"""What a combination did."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["CombinationReport", "CombinedModule"]


@dataclass(frozen=True, slots=True)
class CombinedModule:
    """What became of one module.

    Attributes
    ----------
    target : str
    ranks : list of int
        Of the adapters that change it.
    rank : int
        Of the result.
    energy : float
        Share of the combined delta's squared norm that this rank holds.
    error : float
        √(1 − energy).
    """

    target: str
    ranks: list[int]
    rank: int
    energy: float
    error: float


@dataclass(frozen=True, slots=True)
class CombinationReport:
    """What a combination did.

    Attributes
    ----------
    sources : list of str
    target : str
    method : str
    weights : list of float
    modules : list of CombinedModule
    parameters : int
    notes : list of str
    seconds : float
    dry_run : bool
    """

    sources: list[str]
    target: str
    method: str
    weights: list[float]
    modules: list[CombinedModule]
    parameters: int
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    dry_run: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON members."""
        return asdict(self)
