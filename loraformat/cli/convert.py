"""``loraformat convert``."""

from __future__ import annotations

from typing import Any

import click

from loraformat.cli.console import table, took, with_notes, wrote
from loraformat.cli.options import WeightType, reporting_command
from loraformat.storage.byte_sizes import format_size

_LAYOUTS = ["dense", "each", "fused", "experts4bit"]
_EXAMPLE = """\b
Example:
  loraformat convert meta-llama/Llama-3.2-1B my-bundle
  loraformat convert my-bundle dense --to safetensors --dtype bf16
  loraformat convert my-bundle model.gguf --dtype q8_0
  loraformat convert my-peft-adapter my-bundle/adapters/medical
"""


def _text(report: Any) -> str:
    lines = [
        f"{report.source_format} {report.source} ({format_size(report.input_bytes)})",
        f"{wrote(report)} {report.target_format} {report.target} "
        f"({format_size(report.output_bytes)}",
    ]
    if hasattr(report, "verbatim"):
        lines[-1] += "), copied byte for byte" if report.verbatim else "), converted"
        ranks = ", ".join(map(str, report.ranks)) or "none"
        lines.append(f"{report.modules} modules, rank {ranks}, {report.parameters:,} parameters")
    else:
        lines[-1] += f", {report.bits_per_weight:.3f} bits per weight)"
        lines.append(
            f"{report.tensors} tensors, {report.quantized} of them quantized to NF4{took(report)}"
        )
        lines += _errors(report)
    return with_notes(lines, report)


def _errors(report: Any) -> list[str]:
    if not report.errors_by_kind:
        return []
    rows = [[kind, f"{error:.2%}"] for kind, error in report.errors_by_kind.items()]
    of = "quantized source" if report.quantized_before else "weight"
    return ["", table(["quantized", f"relative RMS error (% of {of} RMS)"], rows), ""]


command = reporting_command(
    "convert",
    _EXAMPLE,
    _text,
    metavars={"source": "SRC"},
    types={"dtype": WeightType(), "experts": click.Choice(_LAYOUTS)},
)
