"""``loraformat unmerge``."""

from __future__ import annotations

from typing import Any

import click

from loraformat.cli.console import on_terminal, show
from loraformat.cli.options import (
    allow_pickle_option,
    max_shard_size_option,
    model_output_options,
    weight_option,
    writing_options,
)
from loraformat.storage.byte_sizes import format_size

_EXAMPLE = """\b
Example:
  loraformat unmerge merged --undo undo.lfu -o base
  loraformat unmerge merged --adapter my-adapter -o nearly-base
"""


@click.command(epilog=_EXAMPLE)
@click.argument("merged", metavar="MERGED")
@model_output_options()
@click.option("--undo", metavar="FILE", help="The undo record written by `merge --undo`.")
@click.option(
    "--adapter",
    multiple=True,
    metavar="ADAPTER",
    help="With --undo: current location of a merged adapter. Without: adapter to subtract. "
    "Repeatable.",
)
@weight_option("Without --undo: weight of each adapter. [default: 1]")
@allow_pickle_option
@max_shard_size_option
@writing_options(
    "an existing model at OUT",
    "Check that record, model and adapters match without writing anything.",
)
def command(merged: str, output: str, as_json: bool, quiet: bool, **options: Any) -> None:
    """Undo a merge and restore the base.

    With its undo record the base is restored bit for bit, verified by hash; undo several
    merges in reverse order. Without one the adapters are subtracted, which is only approximate.
    """
    from loraformat.ops.unmerge.unmerge import unmerge

    bar = on_terminal(quiet or options["dry_run"])
    report = unmerge(merged, output, progress=bar, **options)
    show("unmerge", report, _text, as_json=as_json, quiet=quiet)


def _text(report: Any) -> str:
    would = "would write" if report.dry_run else "wrote"
    kind = "the original" if report.exact else "an approximation of the original"
    lines = [
        f"{would} {report.target} ({format_size(report.output_bytes)}), {kind}",
        f"{report.tensors} tensors, {report.restored} of them restored"
        + ("" if report.dry_run else f", {report.seconds:.1f} s"),
    ]
    if report.exact and not report.dry_run:
        lines.append("every tensor has its SHA-256 from before the merge")
    lines += [f"note: {note}" for note in report.notes]
    return "\n".join(lines)
