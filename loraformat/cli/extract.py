"""``loraformat extract``."""

from __future__ import annotations

from typing import Any

from loraformat.cli.console import table
from loraformat.cli.options import RankOrAuto, reporting_command

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
    would = "would write" if report.dry_run else "wrote"
    lines = [
        table(
            [
                "module",
                "rank",
                "captured (% of |D|²)",
                "error (% of |D|)",
                "|D|",
                "noise threshold",
            ],
            rows,
        ),
        "",
        f"{would} {report.target}: {report.parameters:,} parameters "
        f"capture {report.captured:.2%} of the squared difference"
        + ("" if report.dry_run else f", {report.seconds:.1f} s"),
        f"{report.unchanged} tensors are unchanged, {len(report.replaced)} replaced in full"
        + (f": {', '.join(report.replaced[:6])}" if report.replaced else "")
        + (", ..." if len(report.replaced) > 6 else ""),
        *(f"left out: {name} {reason}" for name, reason in report.left_out.items()),
    ]
    return "\n".join([*lines, *(f"note: {note}" for note in report.notes)])


command = reporting_command(
    "extract",
    _EXAMPLE,
    _text,
    metavars={"rank": "R|auto", "tuned": "TUNED"},
    types={"rank": RankOrAuto()},
)
