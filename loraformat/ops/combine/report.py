"""The report of ``combine``."""

from __future__ import annotations

from dataclasses import dataclass, replace

from loraformat.model.report import Report
from loraformat.ops.deltas.factors import error_with_rounding

__all__ = ["CombinationReport", "CombinedModule"]


@dataclass(frozen=True, slots=True)
class CombinedModule:
    """Result for one module.

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
        √(1 − energy). `combine` adds what rounding the new factors to their dtype costs.
    """

    target: str
    ranks: list[int]
    rank: int
    energy: float
    error: float

    def with_rounding(self, rounding: float) -> CombinedModule:
        """Return the module with the error of its factors' rounding added."""
        error = error_with_rounding(self.error, rounding)
        return replace(self, energy=1 - error**2, error=error)


@dataclass(frozen=True, slots=True, repr=False)
class CombinationReport(Report):
    """The report of ``combine``.

    Attributes
    ----------
    sources : list of str
    target : str
    method : str
    weights : list of float
    modules : list of CombinedModule
    parameters : int
    """

    sources: list[str]
    target: str
    method: str
    weights: list[float]
    modules: list[CombinedModule]
    parameters: int
