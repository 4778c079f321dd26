"""``loraformat spectrum``."""

from __future__ import annotations

from typing import Any

import click

import loraformat
from loraformat.cli.console import on_terminal, show, table, with_notes
from loraformat.cli.options import verb_command

_EXAMPLE = """\b
Example:
  loraformat spectrum my-adapter
  loraformat spectrum my-adapter --plot spectrum.png --json
"""
_PLOT = click.Option(
    ["--plot", "picture"],
    metavar="FILE",
    help="Also plot it to a .png, .svg or .pdf file. Needs: pip install 'loraformat[plot]'.",
)


def _run(picture: str | None, as_json: bool, quiet: bool, **options: Any) -> None:
    from loraformat.ops.plots import check_picture

    if picture is not None:
        check_picture(picture)
    report = loraformat.spectrum(**options, progress=on_terminal(quiet))
    if picture is not None:
        loraformat.plot_spectrum(report, picture)
    show("spectrum", report, _text, as_json=as_json, quiet=quiet)


def _text(report: Any) -> str:
    words = list(report.suggested)
    head = [f"rank for {word}" for word in words]
    rows = [
        [m.target, m.rank, f"{m.norm:.4g}", f"{m.stable_rank:.1f}", f"{m.entropy_rank:.1f}",
         *(m.suggested[word] for word in words)]
        for m in report.modules
    ]  # fmt: skip
    parts = [
        f"{word} of |D|²: rank {report.suggested[word]} in every module, or "
        f"{report.suggested_parameters[word]:,} parameters with a rank per module"
        for word in words
    ]
    lines = [
        table(["module", "rank", "|D|", "stable rank", "entropy rank", *head], rows),
        "",
        f"{report.source}: {len(report.modules)} modules, {report.parameters:,} parameters",
        *parts,
    ]
    return with_notes(lines, report)


command = verb_command("spectrum", _EXAMPLE, _run, extra={"allow_pickle": [_PLOT]})
