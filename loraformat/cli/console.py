"""Terminal output: sizes, tables, progress bars on stderr, JSON on stdout."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from loraformat.model.report import Report

__all__ = [
    "Resumable",
    "clean",
    "echo_json",
    "largest_error",
    "on_terminal",
    "report_options",
    "say",
    "show",
    "table",
    "times",
    "took",
    "with_notes",
    "wrote",
]


def _silence_hub(context: click.Context, parameter: click.Parameter, quiet: bool) -> bool:
    if quiet:  # huggingface_hub, which has bars of its own, reads this when it is imported
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    return quiet


_json = click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")
_quiet = click.option(
    "--quiet", "-q", is_flag=True, callback=_silence_hub, help="Print errors only."
)
_Command = TypeVar("_Command", bound=Callable[..., Any])


def report_options(command: _Command) -> _Command:
    """Add ``--json`` and ``--quiet``, passed as ``as_json`` and ``quiet``."""
    return _json(_quiet(command))


class Resumable(KeyboardInterrupt):
    """Interruption after which ``--resume`` continues."""


def times(share: float) -> str:
    """Format a ratio as a percentage, or as a multiple if it is large.

    Examples
    --------
    >>> times(0.0747), times(44.15)
    ('7.47%', '44 x')
    """
    return f"{share:.2%}" if share < 10 else f"{share:.0f} x"


def largest_error(modules: Sequence[Any]) -> str:
    """Return the summary of modules' errors, shares of the norm of the delta D; may be empty.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> largest_error([SimpleNamespace(error=0.25), SimpleNamespace(error=0.002)])
    ', largest error 0.25 x |D|'
    """
    if not modules:
        return ""
    return f", largest error {max(module.error for module in modules):.3g} x |D|"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a plain table; columns of numbers are aligned to the right.

    Examples
    --------
    >>> print(table(["name", "bytes"], [["a", 10], ["bc", 5]]))
    name  bytes
    a        10
    bc        5
    """
    body = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    right = [
        bool(body) and all(re.match(r"[-\d.<]", row[i] or "-") for row in body)
        for i in range(len(head))
    ]
    lines = []
    for row in [list(head), *body]:
        cells = zip(row, widths, right, strict=True)
        lines.append("  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in cells).rstrip())
    return "\n".join(lines)


def clean(text: str, keep: str = "") -> str:
    r"""Return text with control characters escaped: untrusted text must not move the cursor.

    Examples
    --------
    >>> clean("rank\x1b[2J\n")
    'rank\\x1b[2J\\n'
    """
    return "".join(c if c.isprintable() or c in keep else ascii(c)[1:-1] for c in text)


def say(text: str, *, err: bool = False) -> None:
    """Print lines on stdout, or on stderr, each of them `clean`."""
    click.echo(clean(text, keep="\n"), err=err)


def echo_json(schema: str, members: dict[str, Any]) -> None:
    """Print one JSON object with its schema's name and version."""
    click.echo(
        json.dumps({"schema": f"loraformat.{schema}", "schema_version": 1, **members}, indent=2)
    )


def show(
    verb: str, report: Report, text: Callable[[Any], str], *, as_json: bool, quiet: bool
) -> None:
    """Print a report: as JSON, whose schema is named as the verb, as text, or not at all."""
    if as_json:
        echo_json(verb, report.to_dict())
    elif not quiet:
        say(text(report))


def wrote(report: Report) -> str:
    """Say whether something was written, or a dry run would write it."""
    return "would write" if report.dry_run else "wrote"


def took(report: Report) -> str:
    """Return the duration behind a comma; empty for a dry run."""
    return "" if report.dry_run else f", {report.seconds:.1f} s"


def with_notes(lines: Iterable[str], report: Report) -> str:
    """Return a text with the report's notes, and what was not carried over, as its last lines."""
    notes = [f"note: {note}" for note in report.notes]
    return "\n".join([*lines, *notes, *(f"not carried over: {loss}" for loss in report.lost)])


def on_terminal(quiet: bool) -> bool:
    """Tell whether to show a progress bar: stderr is a terminal and not ``--quiet``."""
    return not quiet and sys.stderr.isatty()
