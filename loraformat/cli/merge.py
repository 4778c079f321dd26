"""``loraformat merge``."""

from __future__ import annotations

from typing import Any

import click

from loraformat.cli.console import on_terminal, show, table, times
from loraformat.cli.options import (
    WeightType,
    allow_base_mismatch_option,
    allow_pickle_option,
    from_option,
    gguf_options,
    max_shard_size_option,
    model_output_options,
    weight_option,
    writing_options,
)
from loraformat.storage.byte_sizes import format_size

_EXAMPLE = """\b
Example:
  loraformat merge meta-llama/Llama-3.2-1B my-adapter -o merged
  loraformat merge base A B --weight 0.7 --weight 0.3 -o merged --undo undo.lfu
  loraformat merge bundle A B -o both --to loraformat --name both
"""


@click.command(epilog=_EXAMPLE)
@click.argument("base", metavar="BASE")
@click.argument("adapters", metavar="ADAPTER...", nargs=-1, required=True)
@model_output_options()
@weight_option("Weight of each adapter, in the same order. [default: 1]")
@from_option("BASE")
@click.option(
    "--dtype",
    type=WeightType(),
    help="Dtype of the output. [default: unchanged; NF4 becomes bf16, GGUF block types f32; f16 "
    "for a GGUF output] The q types are only for GGUF outputs.",
)
@click.option(
    "--undo",
    metavar="FILE",
    help="Write an undo record, from which `unmerge` restores BASE exactly.",
)
@click.option(
    "--requantize",
    is_flag=True,
    help="Quantize the merged weights to NF4. For a base that was already NF4 this loses nearly "
    "all of the delta.",
)
@click.option(
    "--name",
    metavar="NAME",
    help="With --to loraformat: name of the adapter in the bundle. [default: its directory's name]",
)
@allow_base_mismatch_option("Accept an adapter that was made for another base.")
@allow_pickle_option
@gguf_options
@click.option(
    "--modules", "show_modules", is_flag=True, help="Show one row per module as well as the total."
)
@max_shard_size_option
@writing_options("an existing model at OUT")
def command(
    base: str,
    adapters: tuple[str, ...],
    output: str,
    show_modules: bool,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Merge adapters into a base and write a new model.

    BASE is never modified. The sum of all deltas is added to each weight and rounded once. A
    quantized BASE is written as dense weights, because requantizing would lose most of the delta.
    With `--to loraformat` the NF4 codes are kept and the combined adapter is stored separately in
    the bundle.
    """
    from loraformat.ops.merge.merge import merge

    bar = on_terminal(quiet or options["dry_run"])
    report = merge(base, adapters, output, progress=bar, **options)
    show("merge", report, lambda report: _text(report, show_modules), as_json=as_json, quiet=quiet)


def _text(report: Any, show_modules: bool) -> str:
    would = "would write" if report.dry_run else "wrote"
    verb = "merged" if report.beside is None else "unchanged, with a separate adapter"
    lines = [
        f"{report.source_format} {report.source}",
        *(f"+ {a.weight:g} x {a.format} {a.path}" for a in report.adapters),
        f"{would} {report.target_format} {report.target} ({format_size(report.output_bytes)})",
        f"{report.merged} tensors {verb}, {report.replaced} replaced, of {report.tensors}"
        + ("" if report.dry_run else f", {report.seconds:.1f} s"),
    ]
    if report.total is not None:
        shown = [*(report.modules if show_modules else ()), report.total]
        rows = [
            [c.name, f"{c.relative:.2%}", f"{c.gain:.2%}", times(c.error), f"{c.swallowed:.1%}"]
            for c in shown
        ]
        head = ["delta D", "|D| (% of |W|)", "retained (% of D)", "error (% of |D|)",
                "unchanged (% of weights)"]  # fmt: skip
        lines += ["", table(head, rows), ""]
    if report.undo is not None:
        lines.append(
            f"undo record {report.undo.path} ({format_size(report.undo.bytes)}, "
            f"{report.undo.bits_per_weight:.4f} bits per weight); keep the adapters as well"
        )
    if report.beside is not None:
        lines.append(
            f"the base is unchanged; the adapter is adapters/{report.beside} in the bundle"
        )
    lines += [f"warning: {warning}" for warning in report.warnings]
    lines += [f"note: {note}" for note in report.notes]
    lines += [f"note: {a.path}: {note}" for a in report.adapters for note in a.notes]
    lines += [f"not carried over: {loss}" for loss in report.lost]
    return "\n".join(lines)
