"""``loraformat reduce``."""

from __future__ import annotations

from typing import Any

import click

from loraformat.cli.console import largest_error, on_terminal, show, table
from loraformat.cli.options import (
    ParameterCount,
    adapter_options,
    adapter_output_option,
    energy_option,
    max_rank_option,
    writing_options,
)

_EXAMPLE = """\b
Example:
  loraformat reduce my-adapter -o my-adapter-r16 --rank 16
  loraformat reduce my-adapter -o small --budget 4M --max-rank 64
  loraformat reduce my-adapter -o small.gguf --rank 8 --base my-model
"""


@click.command(epilog=_EXAMPLE)
@click.argument("adapter", metavar="ADAPTER")
@adapter_output_option
@click.option("--rank", type=click.IntRange(1), metavar="R", help="Rank of every module.")
@energy_option("Keep this fraction of each module's squared norm, for example 0.99.")
@click.option(
    "--budget",
    type=ParameterCount(),
    metavar="N",
    help="Total number of parameters (4M, 500k), distributed over the modules where they retain "
    "most.",
)
@max_rank_option("Upper bound per module; alone, or with --energy or --budget.")
@click.option(
    "--statistics/--no-statistics",
    default=True,
    help="Use activation statistics, if the adapter has them, to minimise the error of the "
    "outputs; else that of the weights.  [default: statistics]",
)
@adapter_options
@writing_options(dry_run="Print ranks and errors without writing anything.")
def command(adapter: str, output: str, as_json: bool, quiet: bool, **options: Any) -> None:
    """Reduce an adapter's rank with the smallest possible error.

    Each module's delta is replaced by its best low-rank approximation, computed from the factors
    in float64. If the adapter has activation statistics, the error of the module's output is
    minimised instead. The new factors are balanced and ordered by singular value, so any prefix of
    them is the best adapter of that rank. rsLoRA and per-module patterns are folded in.
    """
    from loraformat.ops.reduce import reduce

    report = reduce(adapter, output, progress=on_terminal(quiet), **options)
    show("reduce", report, _text, as_json=as_json, quiet=quiet)


def _text(report: Any) -> str:
    rows = [
        [m.target, m.old_rank, m.new_rank, f"{m.energy:.2%}", f"{m.error:.2%}"]
        for m in report.modules
    ]
    would = "would write" if report.dry_run else "wrote"
    kept = "" if report.energy is None else f", {report.energy:.2%} of the energy"
    lines = [
        table(["module", "rank", "new rank", "energy (% of |D|²)", "error (% of |D|)"], rows),
        "",
        f"{would} {report.target}: {report.new_parameters:,} of {report.old_parameters:,} "
        f"parameters{kept}{largest_error(report.modules)}"
        + ("" if report.dry_run else f", {report.seconds:.1f} s"),
    ]
    if any(m.activation_aware for m in report.modules):
        lines.append("note: energies and errors refer to module outputs, according to the "
                     "adapter's activation statistics")  # fmt: skip
    return "\n".join([*lines, *(f"note: {note}" for note in report.notes)])
