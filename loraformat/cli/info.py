"""``loraformat info``."""

from __future__ import annotations

from typing import Any

import click

import loraformat
from loraformat.cli.console import echo_json, say, table
from loraformat.cli.options import verb_command
from loraformat.model.quantization_history import spelled
from loraformat.storage.byte_sizes import format_size

_EXAMPLE = """\b
Example:
  loraformat info my-bundle
  loraformat info my-bundle --tensors --json
  loraformat info my-bundle --plot errors.png
  loraformat info my-bundle/adapters/medical
"""
_TENSORS = click.Option(
    ["--tensors"], is_flag=True, help="List every tensor, or every target module of an adapter."
)
_PLOT = click.Option(
    ["--plot", "picture"],
    metavar="FILE",
    help="Bundles: plot the quantization error by layer to a .png, .svg or .pdf file. Needs: pip "
    "install 'loraformat[plot]'.",
)


def _run(tensors: bool, picture: str | None, as_json: bool, quiet: bool, **options: Any) -> None:
    if picture is not None:
        from loraformat.ops.plots import check_picture

        check_picture(picture)
    summary = loraformat.info(**options)
    if picture is not None:
        loraformat.plot_errors(summary, picture)
    if as_json:
        echo_json("info", summary.to_dict(tensors=tensors))
    elif not quiet:
        text = _adapter_text if summary.kind == "adapter" else _text
        say(text(summary, tensors))


def _text(summary: Any, tensors: bool) -> str:
    facts = [
        ("format", summary.format),
        ("architecture", summary.architecture or "unknown: there is no config.json"),
        ("layers", summary.layers),
        ("parameters", f"{summary.parameters:,}"),
        (
            "weights",
            f"{format_size(summary.weight_bytes)}, {summary.bits_per_weight:.3f} bits per weight",
        ),
        ("files", format_size(summary.total_bytes)),
        ("stored as", ", ".join(f"{name}: {count:,}" for name, count in summary.dtypes.items())),
    ]
    if summary.quantized_bits_per_weight is not None:
        nested = "double quantization" if summary.double_quant else "float32 scales"
        blocks = ", ".join(map(str, summary.block_sizes))
        bits = f"{summary.quantized_bits_per_weight:.3f} bits per weight"
        share = f"{summary.quantized_parameters / summary.parameters:.1%} of the parameters"
        facts.append(("quantized", f"{share}: NF4, block size {blocks}, {nested}, {bits}"))
    if summary.fingerprint:
        facts.append(("fingerprint", summary.fingerprint))
        facts.append(("created by", f"{summary.created_by} from {_origin(summary.source)}"))
    if summary.quantized_before:
        steps = spelled(summary.quantized_before)
        facts.append(("history", f"{steps}; errors are relative to that, not to the original"))
    for adapter in summary.adapters:
        ranks = ", ".join(map(str, adapter.ranks)) or "none"
        about = (
            f"{adapter.name}, rank {ranks}, {adapter.parameters:,} parameters, "
            f"{format_size(adapter.bytes)}, on {', '.join(adapter.targets)}; "
            f"base {adapter.base or 'not named'}"
        )
        facts.append(("adapter", about))
    rows = [
        [t.name, t.encoding, t.dtype, "x".join(map(str, t.shape)) or "scalar", t.bytes,
         "-" if t.relative_rms_error is None else f"{t.relative_rms_error:.2%}"]
        for t in summary.tensors
    ]  # fmt: skip
    head = ["tensor", "encoding", "dtype", "shape", "bytes", "relative RMS error"]
    return _lines(facts, table(head, rows) if tensors else None)


def _adapter_text(adapter: Any, modules: bool) -> str:
    parts = {"DoRA": adapter.dora, "bias": adapter.biases, "embedding": adapter.embeddings}
    also = ", ".join(f"{count} with {what}" for what, count in parts.items() if count)
    facts = [
        ("format", f"{adapter.format} (adapter)"),
        ("rank", _listed(adapter.ranks)),
        ("alpha", f"{_listed(adapter.alphas)}; scaling {_listed(adapter.scalings)}"),
        ("targets", f"{len(adapter.modules)} modules: {', '.join(adapter.targets) or 'none'}"),
        ("parameters", f"{adapter.parameters:,}"),
        ("files", format_size(adapter.bytes)),
        ("stored as", ", ".join(f"{name}: {count:,}" for name, count in adapter.dtypes.items())),
        ("base", adapter.base_model or "not named"),
        ("base hash", adapter.base_fingerprint or "records no base fingerprint"),
        *([("including", also)] if also else []),
        *(("replaces", name) for name in adapter.replacements),
        *(("replaces", f"rows of {name}") for name in adapter.replaced_rows),
        *([("listed by", adapter.bundle)] if adapter.bundle else []),
        *(("note", note) for note in adapter.notes),
    ]
    rows = [
        [m.target, m.rank, f"{m.alpha:g}", f"{m.scaling:.4g}",
         f"{m.out_features}x{m.in_features}", m.dtype, m.parameters]
        for m in adapter.modules
    ]  # fmt: skip
    head = ["module", "rank", "alpha", "scaling", "shape", "dtype", "parameters"]
    return _lines(facts, table(head, rows) if modules else None)


def _lines(facts: list[tuple[str, Any]], below: str | None) -> str:
    lines = [f"{name + ':':14}{value}" for name, value in facts]
    return "\n".join([*lines, "", below] if below is not None else lines)


def _listed(numbers: list[float]) -> str:
    return ", ".join(f"{number:g}" for number in numbers) or "none"


def _origin(source: dict[str, str]) -> str:
    origin = source.get("format", "an unknown format")
    if "repo" in source:
        origin += f" {source['repo']}@{source.get('revision', '?')}"
    return origin


command = verb_command("info", _EXAMPLE, _run, extra={"allow_pickle": [_TENSORS, _PLOT]})
