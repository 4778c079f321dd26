"""The report of ``extract``."""

from __future__ import annotations

from dataclasses import dataclass

from loraformat.model.report import Report

__all__ = ["ExtractedModule", "ExtractionReport"]


@dataclass(frozen=True, slots=True)
class ExtractedModule:
    """One changed matrix.

    Attributes
    ----------
    target : str
    rank : int
        0: nothing in the difference stands out of the noise, and it is left out.
    captured : float
        Share of the difference's squared norm in the delta, whose factors are rounded to their
        dtype: measured, not estimated.
    error : float
        √(1 − captured).
    norm : float
        ‖D‖ of the difference.
    noise : float
        Where the noise edge is, in units of singular values.
    capped : bool
        More parts were wanted than the largest rank allows.
    """

    target: str
    rank: int
    captured: float
    error: float
    norm: float
    noise: float = 0.0
    capped: bool = False


@dataclass(frozen=True, slots=True, repr=False)
class ExtractionReport(Report):
    """The report of ``extract``.

    Attributes
    ----------
    base, tuned, target : str
    modules : list of ExtractedModule
    replaced : list of str
        Tensors that the adapter replaces as a whole: norms, biases, grown vocabularies.
    unchanged : int
    left_out : dict of str to str
        Changes that the adapter does not hold, by name, with the reason.
    parameters : int
        Elements of A and B.
    captured : float
        Share of the squared norm of all matrices' differences.
    """

    base: str
    tuned: str
    target: str
    modules: list[ExtractedModule]
    replaced: list[str]
    unchanged: int
    left_out: dict[str, str]
    parameters: int
    captured: float
