"""Base class of all reports."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from html import escape
from typing import Any, ClassVar

__all__ = ["Report"]

_MAX_TEXT = 60


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Report:
    """What a verb did, or of a dry run would do.

    Attributes
    ----------
    notes : list of str
        What a user should know.
    lost : list of str
        What the input held and the output does not.
    seconds : float
        Duration; 0 where it is not measured.
    dry_run : bool
        Nothing was written.

    Examples
    --------
    >>> Report(notes=["one", "two"], seconds=1.25)
    Report(notes=[2], seconds=1.25)
    """

    #: Those of the members above that are in the class's JSON.
    _shared: ClassVar[tuple[str, ...]] = ("notes", "seconds", "dry_run")

    notes: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    seconds: float = 0.0
    dry_run: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return the members that ``--json`` prints, for ``json.dumps``."""
        members = asdict(self)
        shared = {entry.name: members.pop(entry.name) for entry in fields(Report)}
        return members | {name: shared[name] for name in shared if name in self._shared}

    def __repr__(self) -> str:
        """Return one short line: lists by their lengths, nothing that is empty."""
        members = ((name, value) for name, value in _members(self) if value not in (None, False))
        told = ", ".join(f"{name}={_short(value)}" for name, value in members if not _empty(value))
        return f"{type(self).__name__}({told})"

    def _repr_html_(self) -> str:
        """Return a table for notebooks; every text in it is escaped."""
        rows = "".join(
            f"<tr><th style='text-align:left'>{escape(name)}</th>"
            f"<td style='text-align:left'>{_cell(value)}</td></tr>"
            for name, value in _members(self)
            if value is not None and not _empty(value)
        )
        return f"<table><caption>{escape(type(self).__name__)}</caption>{rows}</table>"


def _members(report: Any) -> Iterable[tuple[str, Any]]:
    """Yield names and values as they are shown, a class's own before the shared ones."""
    shared = {entry.name for entry in fields(Report)}
    shown = [entry.name for entry in fields(report) if entry.repr]
    for name in sorted(shown, key=lambda name: name in shared):
        yield name, getattr(report, name)


def _empty(value: Any) -> bool:
    """Tell what says nothing: no text, no members, no time."""
    return isinstance(value, str | list | dict | float) and not value


def _short(value: Any) -> str:
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, int | float):
        return f"{value:.6g}" if isinstance(value, float) else str(value)
    if isinstance(value, str):
        return repr(value if len(value) <= _MAX_TEXT else f"{value[: _MAX_TEXT - 1]}…")
    if isinstance(value, Mapping):
        return f"{{{len(value)}}}"
    if isinstance(value, Sequence):
        return f"[{len(value)}]"
    return type(value).__name__


def _cell(value: Any) -> str:
    """Return a value as HTML: lists and nested records folded."""
    if is_dataclass(value) or isinstance(value, Mapping):
        pairs = value.items() if isinstance(value, Mapping) else _fields_of(value)
        return _folded(len(list(pairs)), (f"{name}: {_text(part)}" for name, part in pairs))
    if isinstance(value, Sequence) and not isinstance(value, str):
        if all(isinstance(part, str | int | float) for part in value):
            return "<br>".join(escape(_text(part)) for part in value)
        return _folded(len(value), (_text(part) for part in value))
    return escape(_text(value))


def _fields_of(record: Any) -> list[tuple[str, Any]]:
    return [(entry.name, getattr(record, entry.name)) for entry in fields(record) if entry.repr]


def _folded(count: int, lines: Iterable[str]) -> str:
    body = "<br>".join(escape(line) for line in lines)
    return f"<details><summary>{count}</summary>{body}</details>"


def _text(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
