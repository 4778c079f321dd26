"""``loraformat remove``."""

from __future__ import annotations

from typing import Any

import click

from loraformat.cli.console import report_options, show

_EXAMPLE = """\b
Example:
  loraformat remove my-bundle/adapters/medical
"""


@click.command(epilog=_EXAMPLE)
@click.argument("path")
@report_options
def command(path: str, as_json: bool, quiet: bool) -> None:
    """Remove an adapter from a bundle.

    PATH is BUNDLE/adapters/NAME. The adapter is removed from the manifest first, then its files
    are deleted. Nothing else in the bundle changes.
    """
    from loraformat.ops.remove import remove

    show("remove", remove(path), _text, as_json=as_json, quiet=quiet)


def _text(report: Any) -> str:
    return f"removed adapter {report.adapter} from {report.bundle}"
