"""``loraformat unmerge``."""

from __future__ import annotations

from typing import Any

from loraformat.cli.options import reporting_command
from loraformat.storage.byte_sizes import format_size

_EXAMPLE = """\b
Example:
  loraformat unmerge merged --undo undo.lfu -o base
  loraformat unmerge merged --adapter my-adapter -o nearly-base
"""


def _text(report: Any) -> str:
    would = "would write" if report.dry_run else "wrote"
    kind = "the original" if report.exact else "an approximation of the original"
    lines = [
        f"{would} {report.target} ({format_size(report.output_bytes)}), {kind}",
        f"{report.tensors} tensors, {report.restored} of them restored"
        + ("" if report.dry_run else f", {report.seconds:.1f} s"),
    ]
    if report.exact and not report.dry_run:
        lines.append("every tensor has its SHA-256 from before the merge")
    lines += [f"note: {note}" for note in report.notes]
    return "\n".join(lines)


command = reporting_command(
    "unmerge", _EXAMPLE, _text, metavars={"merged": "MERGED", "output": "OUT"}
)
