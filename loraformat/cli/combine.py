"""``loraformat combine``."""

from __future__ import annotations

from typing import Any

import click

from loraformat.cli.console import largest_error, table
from loraformat.cli.options import reporting_command
from loraformat.ops.combine.options import METHODS

_EXAMPLE = """\b
Example:
  loraformat combine polite concise -o both --method svd --rank 16
  loraformat combine skill habit -o cured --method linear --weight 1 --weight -0.5
"""


def _text(report: Any) -> str:
    rows = [
        [m.target, "+".join(map(str, m.ranks)), m.rank, f"{m.energy:.2%}", f"{m.error:.2%}"]
        for m in report.modules
    ]
    terms = [f"{w:g} x {path}" for w, path in zip(report.weights, report.sources, strict=True)]
    would = "would write" if report.dry_run else "wrote"
    lines = [
        table(["module", "ranks", "new rank", "energy (% of |D|²)", "error (% of |D|)"], rows),
        "",
        f"{would} {report.target}: {report.method} of {', '.join(terms)}; "
        f"{report.parameters:,} parameters{largest_error(report.modules)}"
        + ("" if report.dry_run else f", {report.seconds:.1f} s"),
    ]
    return "\n".join([*lines, *(f"note: {note}" for note in report.notes)])


command = reporting_command("combine", _EXAMPLE, _text, types={"method": click.Choice(METHODS)})
