"""``loraformat convert``."""

from __future__ import annotations

from typing import Any

import click

from loraformat.cli.console import ByteSize, on_terminal, show, table
from loraformat.cli.options import (
    WeightType,
    allow_base_mismatch_option,
    allow_pickle_option,
    base_option,
    from_option,
    gguf_options,
    writing_options,
)
from loraformat.storage.byte_sizes import format_size

_EXAMPLE = """\b
Example:
  loraformat convert meta-llama/Llama-3.2-1B my-bundle
  loraformat convert my-bundle dense --to safetensors --dtype bf16
  loraformat convert my-bundle model.gguf --dtype q8_0
  loraformat convert my-peft-adapter my-bundle/adapters/medical
"""


@click.command(epilog=_EXAMPLE)
@click.argument("source", metavar="SRC")
@click.argument("target", metavar="DST")
@from_option("SRC")
@click.option(
    "--to",
    metavar="FORMAT",
    help="Format of DST. [default: from its suffix, else loraformat, or peft for an adapter]",
)
@click.option(
    "--dtype",
    type=WeightType(),
    help="Dtype of dense tensors, or of an adapter's factors. [default: unchanged; f16 for a GGUF "
    "output; GGUF block types become f32] The q types are only for GGUF outputs.",
)
@gguf_options
@click.option(
    "--block-size",
    type=int,
    metavar="N",
    help="Elements per absmax scale: a power of two from 32 to 4096. [default: 64]",
)
@click.option(
    "--double-quant/--no-double-quant",
    default=None,
    help="Quantize the absmax scales, too: 4.127 instead of 4.5 bits per weight.  [default: "
    "double-quant]",
)
@click.option(
    "--skip",
    multiple=True,
    metavar="GLOB",
    help="Do not quantize matching weights. Repeatable; overrides --include.",
)
@click.option(
    "--include", multiple=True, metavar="GLOB", help="Also quantize matching weights. Repeatable."
)
@click.option(
    "--max-shard-size",
    type=ByteSize(),
    show_default="2GB",
    help="Maximum tensor bytes per file.",
)
@base_option("Adapters: base to compare names and shapes with.")
@click.option(
    "--canonical",
    is_flag=True,
    help="Adapters: convert to canonical form instead of copying: scaling folded into B, alpha = "
    "rank.",
)
@allow_pickle_option
@allow_base_mismatch_option(
    "Adapters: accept one made for another base; the output records this base."
)
@click.option("--strict", is_flag=True, help="Fail if DST cannot hold everything in SRC.")
@writing_options()
def command(
    source: str,
    target: str,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Convert a model or an adapter to another format.

    SRC is a local path or a Hub id (org/name, org/name@revision). Weights are read, converted
    and written one tensor at a time; DST appears only when it is complete.

    To add an adapter to a bundle, use BUNDLE/adapters/NAME as DST; to export it, use that as SRC.
    Its files are copied byte for byte where the formats allow. Apart from its manifest, nothing
    else in the bundle changes.
    """
    from loraformat.ops.convert.convert import convert

    bar = on_terminal(quiet or options["dry_run"])
    report = convert(source, target, progress=bar, **options)
    show("convert", report, _text, as_json=as_json, quiet=quiet)


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
