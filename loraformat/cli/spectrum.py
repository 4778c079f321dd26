"""``loraformat spectrum``."""

from __future__ import annotations

from typing import Any

import click

from loraformat.cli.console import on_terminal, report_options, show, table
from loraformat.cli.options import allow_pickle_option

_EXAMPLE = """\b
Example:
  loraformat spectrum my-adapter
  loraformat spectrum my-adapter --plot spectrum.png --json
"""


@click.command(epilog=_EXAMPLE)
@click.argument("adapter", metavar="ADAPTER")
@click.option(
    "--plot",
    "picture",
    metavar="FILE",
    help="Also plot it to a .png, .svg or .pdf file. Needs: pip install 'loraformat[plot]'.",
)
@allow_pickle_option
@report_options
def command(
    adapter: str, picture: str | None, allow_pickle: bool, as_json: bool, quiet: bool
) -> None:
    """Show the singular value spectrum and effective ranks of an adapter.

    Per module: the norm of the delta, its effective rank (stable rank and entropy rank), and
    the smallest ranks that keep 90, 95 and 99 % of its squared norm.
    """
    from loraformat.ops.plots import check_picture
    from loraformat.ops.spectrum.plot import plot_spectrum
    from loraformat.ops.spectrum.spectrum import spectrum

    if picture is not None:
        check_picture(picture)
    report = spectrum(adapter, allow_pickle=allow_pickle, progress=on_terminal(quiet))
    if picture is not None:
        plot_spectrum(report, picture)
    show("spectrum", report, _text, as_json=as_json, quiet=quiet)


def _text(report: Any) -> str:
    words = list(report.suggested)
    head = [f"rank for {word}" for word in words]
    rows = [
        [m.target, m.rank, f"{m.norm:.4g}", f"{m.stable_rank:.1f}", f"{m.entropy_rank:.1f}",
         *(m.suggested[word] for word in words)]
        for m in report.modules
    ]  # fmt: skip
    parts = [
        f"{word} of |D|²: rank {report.suggested[word]} in every module, or "
        f"{report.suggested_parameters[word]:,} parameters with a rank per module"
        for word in words
    ]
    lines = [
        table(["module", "rank", "|D|", "stable rank", "entropy rank", *head], rows),
        "",
        f"{report.source}: {len(report.modules)} modules, {report.parameters:,} parameters",
        *parts,
    ]
    return "\n".join([*lines, *(f"note: {note}" for note in report.notes)])
