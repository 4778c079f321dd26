"""``loraformat formats``."""

from __future__ import annotations

from typing import Any

import click

from loraformat.cli.console import report_options, show

_EXAMPLE = """\b
Example:
  loraformat formats
"""


@click.command(epilog=_EXAMPLE)
@report_options
def command(as_json: bool, quiet: bool) -> None:
    """List the converters, their directions, what each cannot represent, and missing packages."""
    from loraformat.ops.formats import formats

    show("formats", formats(), _text, as_json=as_json, quiet=quiet)


def _text(report: Any) -> str:
    return "\n".join(line for one in report.formats for line in _format(one))


def _format(one: Any) -> list[str]:
    ways = " and ".join(way for way, does in (("reads", one.reads), ("writes", one.writes)) if does)
    return [
        f"{one.name} ({one.kind}; {ways})",
        f"    {one.summary}",
        *(f"    cannot hold: {loss}" for loss in one.loses),
        *([f"    to install: pip install {' '.join(one.missing)}"] if one.missing else []),
    ]
