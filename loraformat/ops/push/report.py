"""Report of ``push``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from loraformat.model.report import Report

__all__ = ["FileReport", "PushReport"]


@dataclass(frozen=True, slots=True)
class FileReport:
    """One published file.

    Attributes
    ----------
    path : str
        In the repository.
    bytes : int
    sha256 : str or None
        Of a pulled small file the Hub has none.
    status : str
        ``new``, ``changed`` or ``same`` compared with what was there; of a dry run without a Hub
        ``not asked``; of a pull, ``fetched`` or
        ``kept`` from an interrupted one.
    """

    path: str
    bytes: int
    sha256: str | None
    status: str


@dataclass(frozen=True, slots=True, repr=False)
class PushReport(Report):
    """Report of ``push``; of a dry run, the plan.

    Attributes
    ----------
    source, repo, url : str
    kind : str
        ``adapter`` or ``bundle``.
    base_model : str
    files : list of FileReport
    removed : list of str
        Files of an earlier push that leave.
    left_out : list of str
        Files of the directory that are no part of it.
    card : str
        The whole card.
    commit : str or None
        None of a dry run.
    pull_request, tag : str or None
    """

    source: str
    repo: str
    url: str
    kind: str
    base_model: str
    files: list[FileReport]
    removed: list[str]
    left_out: list[str]
    card: str
    commit: str | None = None
    pull_request: str | None = None
    tag: str | None = None

    @property
    def changed(self) -> bool:
        """Whether there is anything to publish."""
        return bool(self.removed) or any(file.status != "same" for file in self.files)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON members."""
        return {**Report.to_dict(self), "changed": self.changed}
