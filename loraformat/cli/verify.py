"""``loraformat verify``."""

from __future__ import annotations

from typing import Any

import click

from loraformat.cli.console import on_terminal, report_options, show
from loraformat.cli.options import allow_pickle_option

_EXAMPLE = """\b
Example:
  loraformat verify my-bundle
  loraformat verify my-bundle/adapters/medical
"""

_FOUND_SOMETHING = 4


@click.command(epilog=_EXAMPLE)
@click.argument("path")
@allow_pickle_option
@report_options
def command(path: str, allow_pickle: bool, as_json: bool, quiet: bool) -> int:
    """Verify structure and hashes; exit with code 4 on a finding.

    PATH is a local path or a Hub id, of a model or an adapter. A bundle, or an adapter in one, is
    verified against the hashes in its manifest. Other formats have no hashes: their headers and
    scales are checked, and an adapter's factor pairs, shapes and values.
    """
    from loraformat.ops.verify import verify

    report = verify(path, allow_pickle=allow_pickle, progress=on_terminal(quiet))
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
