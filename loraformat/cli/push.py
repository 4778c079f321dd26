"""``loraformat push``."""

from __future__ import annotations

from typing import Any

from loraformat.cli.console import table
from loraformat.cli.options import reporting_command
from loraformat.storage.byte_sizes import format_size

_EXAMPLE = """\b
Example:
  loraformat push my-adapter me/my-adapter --dry-run
  loraformat push my-adapter me/my-adapter --with-gguf --tag v1.0
  loraformat push my-bundle/adapters/medical me/medical --private
  loraformat push my-bundle me/my-bundle
"""
_METAVARS = {
    "base": "PATH", "base_model": "ORG/NAME", "license": "ID", "message": "TEXT",
    "repo": "REPO_ID", "revision": "BRANCH", "tag": "NAME",
}  # fmt: skip


def _text(report: Any) -> str:
    rows = [[file.path, format_size(file.bytes), file.status] for file in report.files]
    lines = [f"{report.kind} {report.source}, of {report.base_model}", ""]
    lines += [table(["file", "size", "on the Hub"], rows), ""]
    lines += [f"removed: {path}" for path in report.removed]
    if report.left_out:
        shown = ", ".join(report.left_out[:8]) + (", …" if len(report.left_out) > 8 else "")
        lines.append(f"left out: {shown} (add them with --include GLOB)")
    lines += [f"note: {note}" for note in report.notes]
    if report.dry_run:
        lines += ["README.md would be:", "", report.card]
        return "\n".join(lines)
    if not report.changed:
        lines.append(f"unchanged since commit {report.commit[:12]}")
    else:
        lines.append(f"commit {report.commit[:12]}, every file verified by hash")
    if report.tag:
        lines.append(f"tag {report.tag}")
    lines.append(report.pull_request or report.url)
    return "\n".join(lines)


command = reporting_command("push", _EXAMPLE, _text, metavars=_METAVARS)
