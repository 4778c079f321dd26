"""The converters that are installed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from loraformat.model.report import Report
from loraformat.plugins import all_converters

__all__ = ["FormatSummary", "FormatsReport", "formats"]


@dataclass(frozen=True, slots=True)
class FormatSummary:
    """A converter.

    Attributes
    ----------
    name : str
        For ``--from`` and ``--to``.
    kind : str
        ``base`` or ``adapter``.
    summary : str
    reads, writes : bool
        Every format can be read.
    loses : list of str
        What the format cannot represent.
    missing : list of str
        Packages to install first.
    """

    name: str
    kind: str
    summary: str
    reads: bool
    writes: bool
    loses: list[str]
    missing: list[str]


@dataclass(frozen=True, slots=True, repr=False)
class FormatsReport(Report):
    """The installed converters.

    Attributes
    ----------
    formats : list of FormatSummary
    """

    _shared: ClassVar[tuple[str, ...]] = ()

    formats: list[FormatSummary]


def formats() -> FormatsReport:
    """List the converters, their directions, what each cannot represent, and missing packages.

    Returns
    -------
    FormatsReport
    """
    return FormatsReport(
        [
            FormatSummary(
                c.name, c.kind, c.summary, True, c.write is not None, list(c.loses), c.missing()
            )
            for c in all_converters()
        ]
    )
