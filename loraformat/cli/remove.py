"""``loraformat remove``."""

from __future__ import annotations

from typing import Any

from loraformat.cli.options import reporting_command

_EXAMPLE = """\b
Example:
  loraformat remove my-bundle/adapters/medical
"""


def _text(report: Any) -> str:
    return f"removed adapter {report.adapter} from {report.bundle}"


command = reporting_command("remove", _EXAMPLE, _text)
