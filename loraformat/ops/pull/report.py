"""Report of ``pull``."""

from __future__ import annotations

from dataclasses import dataclass

from loraformat.model.report import Report
from loraformat.ops.push.report import FileReport

__all__ = ["PullReport"]


@dataclass(frozen=True, slots=True, repr=False)
class PullReport(Report):
    """Report of ``pull``; of a dry run, the plan.

    Attributes
    ----------
    repo, commit, target : str
    format : str or None
        What it is; None of a dry run, or if no converter knows it.
    files : list of FileReport
    left_out : list of str
    base_model, base_revision, base_path : str or None
        With ``--with-base``: where it is in the Hub's cache.
    """

    repo: str
    commit: str
    target: str
    format: str | None
    files: list[FileReport]
    left_out: list[str]
    base_model: str | None = None
    base_revision: str | None = None
    base_path: str | None = None
