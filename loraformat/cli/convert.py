"""``loraformat convert``."""

from __future__ import annotations

from typing import Any

from loraformat.cli.console import table
from loraformat.cli.options import WeightType, reporting_command
from loraformat.storage.byte_sizes import format_size

_EXAMPLE = """\b
Example:
  loraformat convert meta-llama/Llama-3.2-1B my-bundle
  loraformat convert my-bundle dense --to safetensors --dtype bf16
  loraformat convert my-bundle model.gguf --dtype q8_0
  loraformat convert my-peft-adapter my-bundle/adapters/medical
"""


def _text(report: Any) -> str:
    return _adapter_text(report) if hasattr(report, "verbatim") else _base_text(report)


def _adapter_text(report: Any) -> str:
    how = "copied byte for byte" if report.verbatim else "converted"
    lines = [
        f"{report.source_format} {report.source} ({format_size(report.input_bytes)})",
        f"{'would write' if report.dry_run else 'wrote'} {report.target_format} {report.target} "
        f"({format_size(report.output_bytes)}), {how}",
        f"{report.modules} modules, rank {', '.join(map(str, report.ranks)) or 'none'}, "
        f"{report.parameters:,} parameters",
    ]
    lines += [f"note: {note}" for note in report.notes]
    lines += [f"not carried over: {loss}" for loss in report.lost]
    return "\n".join(lines)


def _base_text(report: Any) -> str:
    would = "would write" if report.dry_run else "wrote"
    lines = [
        f"{report.source_format} {report.source} ({format_size(report.input_bytes)})",
        f"{would} {report.target_format} {report.target} ({format_size(report.output_bytes)}, "
        f"{report.bits_per_weight:.3f} bits per weight)",
        f"{report.tensors} tensors, {report.quantized} of them quantized to NF4"
        + ("" if report.dry_run else f", {report.seconds:.1f} s"),
    ]
    if report.errors_by_kind:
        rows = [[kind, f"{error:.2%}"] for kind, error in report.errors_by_kind.items()]
        of = "quantized source" if report.quantized_before else "weight"
        lines += ["", table(["quantized", f"relative RMS error (% of {of} RMS)"], rows), ""]
    lines += [f"note: {note}" for note in report.notes]
    lines += [f"not carried over: {loss}" for loss in report.lost]
    return "\n".join(lines)


command = reporting_command(
    "convert", _EXAMPLE, _text, metavars={"source": "SRC"}, types={"dtype": WeightType()}
)
