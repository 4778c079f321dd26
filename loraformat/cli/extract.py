"""``loraformat extract``."""

from __future__ import annotations

from typing import Any

from loraformat.cli.console import table, took, with_notes, wrote
from loraformat.cli.options import rank_or_auto, reporting_command

_EXAMPLE = """\b
Example:
  loraformat extract base-model fine-tuned-model -o adapter --rank auto
  loraformat extract base-model fine-tuned-model -o adapter --rank 64 --dtype f16
"""


def _text(report: Any) -> str:
    rows = [
        [m.target, m.rank, f"{m.captured:.2%}", f"{m.error:.2%}", f"{m.norm:.4g}",
         f"{m.noise:.4g}"]
        for m in report.modules
    ]  # fmt: skip
    head = "module", "rank", "captured (% of |D|²)", "error (% of |D|)", "|D|", "noise threshold"
    lines = [
        table(head, rows),
        "",
        f"{wrote(report)} {report.target}: {report.parameters:,} parameters "
        f"capture {report.captured:.2%} of the squared difference{took(report)}",
        f"{report.unchanged} tensors are unchanged, {len(report.replaced)} replaced in full"
        + (f": {', '.join(report.replaced[:6])}" if report.replaced else "")
        + (", ..." if len(report.replaced) > 6 else ""),
        *(f"left out: {name} {reason}" for name, reason in report.left_out.items()),
    ]
    return with_notes(lines, report)


command = reporting_command(
    "extract",
    _EXAMPLE,
    _text,
    metavars={"rank": "R|auto", "tuned": "TUNED"},
    types={"rank": rank_or_auto},
)
