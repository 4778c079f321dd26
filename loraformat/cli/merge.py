"""``loraformat merge``."""

from __future__ import annotations

from typing import Any

import click

import loraformat
from loraformat.cli.console import on_terminal, show, table, times, took, wrote
from loraformat.cli.options import WeightType, verb_command
from loraformat.storage.byte_sizes import format_size

_EXAMPLE = """\b
Example:
  loraformat merge meta-llama/Llama-3.2-1B my-adapter -o merged
  loraformat merge base A B --weight 0.7 --weight 0.3 -o merged --undo undo.lfu
  loraformat merge bundle A B -o both --to loraformat --name both
"""
_MODULES = click.Option(
    ["--modules", "show_modules"],
    is_flag=True,
    help="Show one row per module as well as the total.",
)


def _run(show_modules: bool, as_json: bool, quiet: bool, **options: Any) -> None:
    report = loraformat.merge(**options, progress=on_terminal(quiet))
    show("merge", report, lambda report: _text(report, show_modules), as_json=as_json, quiet=quiet)


def _text(report: Any, show_modules: bool) -> str:
    verb = "merged" if report.beside is None else "unchanged, with a separate adapter"
    lines = [
        f"{report.source_format} {report.source}",
        *(f"+ {a.weight:g} x {a.format} {a.path}" for a in report.adapters),
        f"{wrote(report)} {report.target_format} {report.target} "
        f"({format_size(report.output_bytes)})",
        f"{report.merged} tensors {verb}, {report.replaced} replaced, of {report.tensors}"
        f"{took(report)}",
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


command = verb_command(
    "merge",
    _EXAMPLE,
    _run,
    metavars={"name": "NAME", "output": "OUT"},
    types={"dtype": WeightType()},
    extra={"max_shard_size": [_MODULES]},
)
