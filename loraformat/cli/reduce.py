"""``loraformat reduce``."""

from __future__ import annotations

from typing import Any

from loraformat.cli.console import largest_error, table, took, with_notes, wrote
from loraformat.cli.options import parameter_count, reporting_command

_EXAMPLE = """\b
Example:
  loraformat reduce my-adapter -o my-adapter-r16 --rank 16
  loraformat reduce my-adapter -o small --budget 4M --max-rank 64
  loraformat reduce my-adapter -o small.gguf --rank 8 --base my-model
"""


def _text(report: Any) -> str:
    rows = [
        [m.target, m.old_rank, m.new_rank, f"{m.energy:.2%}", f"{m.error:.2%}"]
        for m in report.modules
    ]
    kept = "" if report.energy is None else f", {report.energy:.2%} of the energy"
    lines = [
        table(["module", "rank", "new rank", "energy (% of |D|²)", "error (% of |D|)"], rows),
        "",
        f"{wrote(report)} {report.target}: {report.new_parameters:,} of "
        f"{report.old_parameters:,} parameters{kept}{largest_error(report.modules)}{took(report)}",
    ]
    if any(m.activation_aware for m in report.modules):
        lines.append("note: energies and errors refer to module outputs, according to the "
                     "adapter's activation statistics")  # fmt: skip
    return with_notes(lines, report)


command = reporting_command(
    "reduce", _EXAMPLE, _text, metavars={"budget": "N"}, types={"budget": parameter_count}
)
