"""``loraformat formats``."""

from __future__ import annotations

from typing import Any

from loraformat.cli.options import reporting_command

_EXAMPLE = """\b
Example:
  loraformat formats
"""


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


command = reporting_command("formats", _EXAMPLE, _text)
