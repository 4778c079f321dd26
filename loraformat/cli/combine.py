"""``loraformat combine``."""

from __future__ import annotations

from typing import Any

import click

from loraformat.cli.console import largest_error, on_terminal, show, table
from loraformat.cli.options import (
    adapter_options,
    adapter_output_option,
    weight_option,
    writing_options,
)

_EXAMPLE = """\b
Example:
  loraformat combine polite concise -o both --method svd --rank 16
  loraformat combine skill habit -o cured --method linear --weight 1 --weight -0.5
"""
_METHODS = ["svd", "cat", "linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"]


@click.command(epilog=_EXAMPLE)
@click.argument("adapters", metavar="ADAPTER...", nargs=-1, required=True)
@adapter_output_option
@click.option(
    "--method",
    type=click.Choice(_METHODS),
    default="svd",
    show_default=True,
    help="svd: best rank-R approximation of the weighted sum. cat: exact sum, ranks added. "
    "linear: exact sum at the smallest sufficient rank. The others prune or drop elements "
    "first.",
)
@weight_option("Weight of each adapter, in the same order; may be negative. [default: 1 each]")
@click.option(
    "--rank",
    type=click.IntRange(1),
    metavar="R",
    help="Rank of the result. [default: the largest input rank, per module]",
)
@click.option(
    "--density",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.5,
    show_default=True,
    metavar="D",
    help="Fraction of elements kept by pruning or dropping.",
)
@click.option(
    "--seed", type=int, default=0, show_default=True, metavar="N", help="Random seed for dropping."
)
@adapter_options
@writing_options(dry_run="Print ranks and errors without writing anything.")
def command(
    adapters: tuple[str, ...], output: str, as_json: bool, quiet: bool, **options: Any
) -> None:
    """Combine several adapters into one.

    The effective deltas are combined (including rsLoRA and per-module patterns), not the factors A
    and B separately. Ranks and target modules may differ.
    """
    from loraformat.ops.combine.combine import combine

    report = combine(adapters, output, progress=on_terminal(quiet), **options)
    show("combine", report, _text, as_json=as_json, quiet=quiet)


def _text(report: Any) -> str:
    rows = [
        [m.target, "+".join(map(str, m.ranks)), m.rank, f"{m.energy:.2%}", f"{m.error:.2%}"]
        for m in report.modules
    ]
    terms = [f"{w:g} x {path}" for w, path in zip(report.weights, report.sources, strict=True)]
    would = "would write" if report.dry_run else "wrote"
    lines = [
        table(["module", "ranks", "new rank", "energy (% of |D|²)", "error (% of |D|)"], rows),
        "",
        f"{would} {report.target}: {report.method} of {', '.join(terms)}; "
        f"{report.parameters:,} parameters{largest_error(report.modules)}"
        + ("" if report.dry_run else f", {report.seconds:.1f} s"),
    ]
    return "\n".join([*lines, *(f"note: {note}" for note in report.notes)])
