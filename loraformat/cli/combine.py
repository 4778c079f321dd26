"""``loraformat combine``."""

from __future__ import annotations

from typing import Any

import click

from loraformat.cli.console import largest_error, table, took, with_notes, wrote
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
    lines = [
        table(["module", "ranks", "new rank", "energy (% of |D|²)", "error (% of |D|)"], rows),
        "",
        f"{wrote(report)} {report.target}: {report.method} of {', '.join(terms)}; "
        f"{report.parameters:,} parameters{largest_error(report.modules)}{took(report)}",
    ]
    return with_notes(lines, report)


command = reporting_command("combine", _EXAMPLE, _text, types={"method": click.Choice(METHODS)})
