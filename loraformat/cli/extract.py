"""``loraformat extract``."""

from __future__ import annotations

from typing import Any

import click

from loraformat.cli.console import on_terminal, show, table
from loraformat.cli.options import (
    RankOrAuto,
    adapter_output_option,
    allow_base_mismatch_option,
    dtype_option,
    energy_option,
    max_rank_option,
    skip_option,
    writing_options,
)

_EXAMPLE = """\b
Example:
  loraformat extract base-model fine-tuned-model -o adapter --rank auto
  loraformat extract base-model fine-tuned-model -o adapter --rank 64 --dtype f16
"""


@click.command(epilog=_EXAMPLE)
@click.argument("base", metavar="BASE")
@click.argument("tuned", metavar="TUNED")
@adapter_output_option
@click.option(
    "--rank",
    type=RankOrAuto(),
    metavar="R|auto",
    help="Rank of every module that differs by more than rounding noise; auto picks the rank at "
    "which rounding noise of TUNED begins. [default: auto]",
)
@energy_option("Capture this fraction of each difference's squared norm.")
@max_rank_option("Upper bound for --rank auto and --energy.", default=256)
@skip_option
@dtype_option("Dtype of the factors. [default: that of TUNED]")
@allow_base_mismatch_option("Allow an output bundle other than BASE.")
@writing_options(dry_run="Print ranks and captured shares without writing anything.")
def command(base: str, tuned: str, output: str, as_json: bool, quiet: bool, **options: Any) -> None:
    """Extract an adapter from a base and its fine-tune.

    The float32 difference of each matrix is approximated by a low-rank delta; changed norms,
    changed biases and resized embeddings are stored in full. The captured share of each module's
    difference is measured and reported.
    """
    from loraformat.ops.extract.extract import extract

    report = extract(base, tuned, output, progress=on_terminal(quiet), **options)
    show("extract", report, _text, as_json=as_json, quiet=quiet)


def _text(report: Any) -> str:
    rows = [
        [m.target, m.rank, f"{m.captured:.2%}", f"{m.error:.2%}", f"{m.norm:.4g}",
         f"{m.noise:.4g}"]
        for m in report.modules
    ]  # fmt: skip
    would = "would write" if report.dry_run else "wrote"
    lines = [
        table(
            [
                "module",
                "rank",
                "captured (% of |D|²)",
                "error (% of |D|)",
                "|D|",
                "noise threshold",
            ],
            rows,
        ),
        "",
        f"{would} {report.target}: {report.parameters:,} parameters "
        f"capture {report.captured:.2%} of the squared difference"
        + ("" if report.dry_run else f", {report.seconds:.1f} s"),
        f"{report.unchanged} tensors are unchanged, {len(report.replaced)} replaced in full"
        + (f": {', '.join(report.replaced[:6])}" if report.replaced else "")
        + (", ..." if len(report.replaced) > 6 else ""),
        *(f"left out: {name} {reason}" for name, reason in report.left_out.items()),
    ]
    return "\n".join([*lines, *(f"note: {note}" for note in report.notes)])
