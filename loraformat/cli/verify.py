"""``loraformat verify``."""

from __future__ import annotations

from typing import Any

import loraformat
from loraformat.cli.console import on_terminal, show
from loraformat.cli.options import verb_command

_EXAMPLE = """\b
Example:
  loraformat verify my-bundle
  loraformat verify my-bundle/adapters/medical
"""

_FOUND_SOMETHING = 4


def _run(as_json: bool, quiet: bool, **options: Any) -> int:
    report = loraformat.verify(**options, progress=on_terminal(quiet))
    show("verify", report, _text, as_json=as_json, quiet=quiet and not report.findings)
    return _FOUND_SOMETHING if report.findings else 0


def _text(report: Any) -> str:
    if report.findings:
        return "\n".join(map(_finding, report.findings))
    hashes = "every hash matches" if report.hashed else "this format has no hashes"
    return f"valid: {report.format}, {report.tensors} tensors; {hashes}"


def _finding(finding: Any) -> str:
    rule = f"{finding.rule}: " if finding.rule else ""
    return f"{rule}{finding.path}: {finding.problem}"


command = verb_command(
    "verify", _EXAMPLE, _run, summary="Verify structure and hashes; exit with code 4 on a finding."
)
