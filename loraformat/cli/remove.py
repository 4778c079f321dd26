"""``loraformat remove``."""

from __future__ import annotations

from loraformat.cli.options import reporting_command

_EXAMPLE = """\b
Example:
  loraformat remove my-bundle/adapters/medical
"""


command = reporting_command(
    "remove", _EXAMPLE, lambda report: f"removed adapter {report.adapter} from {report.bundle}"
)
