"""``loraformat pull``."""

from __future__ import annotations

from typing import Any

from loraformat.cli.console import table, with_notes
from loraformat.cli.options import reporting_command
from loraformat.storage.byte_sizes import format_size

_EXAMPLE = """\b
Example:
  loraformat pull me/my-adapter my-adapter
  loraformat pull me/my-adapter@v1.0 my-adapter --with-base
  loraformat pull me/my-adapter just-gguf --include '*.gguf'
"""


def _text(report: Any) -> str:
    rows = [[file.path, format_size(file.bytes), file.status] for file in report.files]
    total = format_size(sum(file.bytes for file in report.files))
    head = ["file", "size", ""] if not report.dry_run else ["file", "size"]
    lines = [f"{report.repo} at commit {report.commit[:12]}", ""]
    lines += [table(head, [row[: len(head)] for row in rows]), ""]
    if report.left_out:
        shown = ", ".join(report.left_out[:8]) + (", …" if len(report.left_out) > 8 else "")
        lines.append(f"left out: {shown}")
    what = report.format or "files"
    did = f"would fetch {total} to" if report.dry_run else f"wrote {what}, {total}, to"
    checked = "" if report.dry_run else "; every file matches the Hub"
    lines.append(f"{did} {report.target}{checked}")
    if report.base_model:
        at = f"@{report.base_revision}" if report.base_revision else ""
        where = f" in {report.base_path}" if report.base_path else ""
        lines.append(f"base {report.base_model}{at}{where}")
    return with_notes(lines, report)


command = reporting_command("pull", _EXAMPLE, _text, metavars={"repo": "REPO_ID[@REVISION]"})
