"""``loraformat info``."""

from __future__ import annotations

from typing import Any

import click

from loraformat.cli.console import echo_json, json_option, quiet_option, say, size, table

_EXAMPLE = """\b
Example:
  loraformat info my-bundle
  loraformat info my-bundle --tensors --json
"""


@click.command(epilog=_EXAMPLE)
@click.argument("path")
@click.option("--tensors", is_flag=True, help="List every tensor.")
@json_option
@quiet_option
def command(path: str, tensors: bool, as_json: bool, quiet: bool) -> None:
    """Show what a model is, without reading its weights.

    PATH is a local path or a Hub id (org/name, org/name@revision).
    """
    from loraformat.ops.describe import describe

    summary = describe(path)
    if as_json:
        echo_json("info", summary.to_json(tensors=tensors))
    elif not quiet:
        say(_text(summary, tensors))


def _text(summary: Any, tensors: bool) -> str:
    facts = [
        ("format", summary.format),
        ("architecture", summary.architecture or "unknown: no config.json names it"),
        ("layers", summary.layers),
        ("parameters", f"{summary.parameters:,}"),
        ("weights", f"{size(summary.weight_bytes)}, {summary.bits_per_weight:.3f} bits per weight"),
        ("files", size(summary.total_bytes)),
        ("stored as", ", ".join(f"{name}: {count:,}" for name, count in summary.dtypes.items())),
    ]
    if summary.quantized_bits_per_weight is not None:
        nested = "double quantization" if summary.double_quant else "float32 scales"
        blocks = ", ".join(map(str, summary.block_sizes))
        bits = f"{summary.quantized_bits_per_weight:.3f}"
        facts.append(("quantized", f"NF4, block size {blocks}, {nested}, {bits} bits per weight"))
    if summary.fingerprint:
        facts.append(("fingerprint", summary.fingerprint))
        facts.append(("made by", f"{summary.created_by} from {_origin(summary.source)}"))
    lines = [f"{name + ':':14}{value}" for name, value in facts]
    for adapter in summary.adapters:
        ranks = ", ".join(map(str, adapter.ranks)) or "none"
        lines.append(
            f"{'adapter:':14}{adapter.name}, rank {ranks}, {adapter.parameters:,} parameters, "
            f"{size(adapter.bytes)}, on {', '.join(adapter.targets)}; "
            f"base {adapter.base or 'not named'}"
        )
    if tensors:
        rows = [
            [t.name, t.encoding, t.dtype, "x".join(map(str, t.shape)) or "scalar", t.bytes,
             "-" if t.relative_rms_error is None else f"{t.relative_rms_error:.4f}"]
            for t in summary.tensors
        ]  # fmt: skip
        lines += ["", table(["tensor", "encoding", "dtype", "shape", "bytes", "error"], rows)]
    return "\n".join(lines)


def _origin(source: dict[str, str]) -> str:
    origin = source.get("format", "an unknown format")
    if "repo" in source:
        origin += f" {source['repo']}@{source.get('revision', '?')}"
    return origin
