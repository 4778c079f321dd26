"""``loraformat extract``."""

from __future__ import annotations

from typing import Any, Literal

import click

from loraformat.cli.console import echo_json, json_option, progress_bar, quiet_option, say, table

_EXAMPLE = """\b
Example:
  loraformat extract base-model fine-tuned-model -o adapter --rank auto
  loraformat extract base-model fine-tuned-model -o adapter --rank 64 --dtype f16
"""


class RankOrAuto(click.ParamType[int | Literal["auto"]]):
    """A rank, or the word auto."""

    name = "rank"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | Literal["auto"]:
        """Return the rank, or the word."""
        if value == "auto":
            return "auto"
        if not str(value).isdecimal() or not 0 < int(value) < 1 << 31:
            self.fail(f"{value!r} is neither a rank nor auto", param, ctx)
        return int(value)


@click.command(epilog=_EXAMPLE)
@click.argument("base", metavar="BASE")
@click.argument("tuned", metavar="TUNED")
@click.option("-o", "--output", "target", required=True, metavar="DST", help="The adapter.")
@click.option(
    "--rank",
    type=RankOrAuto(),
    metavar="R|auto",
    help="Rank of every module; auto stops where the rounding noise of TUNED begins.",
)
@click.option(
    "--energy",
    type=click.FloatRange(0, 1, min_open=True),
    metavar="E",
    help="Capture this share of each difference's squared norm.",
)
@click.option(
    "--max-rank",
    type=click.IntRange(1),
    default=256,
    show_default=True,
    metavar="R",
    help="For --rank auto and --energy.",
)
@click.option(
    "--skip", multiple=True, metavar="GLOB", help="Leave these tensors alone. Repeatable."
)
@click.option(
    "--dtype",
    type=click.Choice(["f32", "f16", "bf16"]),
    help="Type of the factors; by default that of TUNED.",
)
@click.option("--force", is_flag=True, help="Replace what stands at DST.")
@json_option
@quiet_option
def command(
    base: str, tuned: str, target: str, force: bool, as_json: bool, quiet: bool, **options: Any
) -> None:
    """Extract an adapter from a base and its fine-tune.

    Matrices become low-rank deltas of the difference in float32; changed norms and biases and
    grown vocabularies are replaced as a whole. The share of the difference that was captured is
    measured and reported for each module.
    """
    from loraformat.ops.extract import ExtractOptions, extract

    chosen = ExtractOptions(**options)
    with progress_bar("extract", quiet=quiet) as progress:
        report = extract(base, tuned, target, chosen, force=force, progress=progress)
    if as_json:
        echo_json("extract", report.to_json())
    elif not quiet:
        say(_text(report))


def _text(report: Any) -> str:
    rows = [
        [m.target, m.rank, f"{m.captured:.4%}", f"{m.error:.4f}", f"{m.norm:.4g}",
         "-" if m.noise is None else f"{m.noise:.4g}"]
        for m in report.modules
    ]  # fmt: skip
    lines = [
        table(["module", "rank", "captured", "error", "norm", "noise edge"], rows),
        "",
        f"wrote {report.target}: {report.parameters:,} parameters hold {report.captured:.4%} of "
        f"the squared difference, {report.seconds:.1f} s",
        f"{report.unchanged} tensors are unchanged, {len(report.replaced)} replaced as a whole"
        + (f": {', '.join(report.replaced[:6])}" if report.replaced else "")
        + (", ..." if len(report.replaced) > 6 else ""),
        *(f"left out: {name} {reason}" for name, reason in report.left_out.items()),
    ]
    return "\n".join([*lines, *(f"note: {note}" for note in report.notes)])
