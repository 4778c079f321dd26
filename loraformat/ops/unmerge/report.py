"""The report of ``unmerge``."""

from __future__ import annotations

from dataclasses import dataclass, field

from loraformat.model.report import Report

__all__ = ["Deviation", "UnmergeReport"]


@dataclass(frozen=True, slots=True)
class Deviation:
    """Error bound of a tensor after subtraction.

    Attributes
    ----------
    name : str
    largest : float
        No weight is off by more.
    relative : float
        ‖result − original‖ / ‖result‖ is not more.
    steps : float
        `largest`, in steps of the dtype at that weight: one from the merge at least, and much
        more where a large delta has been taken from a small weight.
    saturated : int
        float16 weights at the end of the range, of which nothing is known and which are not
        counted above.
    """

    name: str
    largest: float
    relative: float
    steps: float
    saturated: int = 0


@dataclass(frozen=True, slots=True, repr=False)
class UnmergeReport(Report):
    """Report of ``unmerge``.

    Attributes
    ----------
    source, target : str
    exact : bool
        Every byte is the original's, proven by hash.
    tensors, restored : int
        All tensors of the output, and those that the merge had changed.
    error_bound : float
        Of an approximate one: ‖result − original‖ / ‖result‖ over all changed tensors is not
        more; else 0.
    modules : list of Deviation
        The same for each tensor.
    output_bytes : int
    """

    source: str
    target: str
    exact: bool
    tensors: int
    restored: int
    error_bound: float = 0.0
    modules: list[Deviation] = field(default_factory=list)
    output_bytes: int = 0
