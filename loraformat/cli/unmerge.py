"""``loraformat unmerge``."""

from __future__ import annotations

from typing import Any

from loraformat.cli.console import took, with_notes, wrote
from loraformat.cli.options import reporting_command
from loraformat.storage.byte_sizes import format_size

_EXAMPLE = """\b
Example:
  loraformat unmerge merged --undo undo.lfu -o base
  loraformat unmerge merged --adapter my-adapter -o nearly-base
"""


def _text(report: Any) -> str:
    kind = "the original" if report.exact else "an approximation of the original"
    lines = [
        f"{wrote(report)} {report.target} ({format_size(report.output_bytes)}), {kind}",
        f"{report.tensors} tensors, {report.restored} of them restored{took(report)}",
    ]
    if report.exact and not report.dry_run:
        lines.append("every tensor has its SHA-256 from before the merge")
    return with_notes(lines, report)


command = reporting_command(
    "unmerge", _EXAMPLE, _text, metavars={"merged": "MERGED", "output": "OUT"}
)
