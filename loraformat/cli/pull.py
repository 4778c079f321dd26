"""``loraformat pull``."""

from __future__ import annotations

from typing import Any

import click

from loraformat.cli.console import on_terminal, show, table
from loraformat.cli.options import writing_options
from loraformat.storage.byte_sizes import format_size

_EXAMPLE = """\b
Example:
  loraformat pull me/my-adapter my-adapter
  loraformat pull me/my-adapter@v1.0 my-adapter --with-base
  loraformat pull me/my-adapter just-gguf --include '*.gguf'
"""


@click.command(epilog=_EXAMPLE)
@click.argument("repo", metavar="REPO_ID[@REVISION]")
@click.argument("target", metavar="DST")
@click.option(
    "--with-base", is_flag=True, help="Also download the base model it names into the Hub cache."
)
@click.option(
    "--include",
    multiple=True,
    metavar="GLOB",
    help="Download matching files only. Repeatable. [default: all but pickles and weights of "
    "other frameworks]",
)
@writing_options(dry_run="Print the files and their sizes without downloading them.")
def command(repo: str, target: str, as_json: bool, quiet: bool, **options: Any) -> None:
    """Download a repository from the Hub at one commit and verify every file by hash.

    DST appears only when all files are complete and match the Hub. To continue after an
    interruption, run the same command again; complete files are not downloaded twice.
    """
    from loraformat.ops.pull.pull import pull

    bar = on_terminal(quiet or options["dry_run"])
    report = pull(repo, target, progress=bar, **options)
    show("pull", report, _text, as_json=as_json, quiet=quiet)


def _text(report: Any) -> str:
    rows = [[file.path, format_size(file.bytes), file.status] for file in report.files]
    total = format_size(sum(file.bytes for file in report.files))
    head = ["file", "size", ""] if not report.dry_run else ["file", "size"]
    lines = [f"{report.repo} at commit {report.commit[:12]}", ""]
    lines += [table(head, [row[: len(head)] for row in rows]), ""]
    if report.left_out:
        shown = ", ".join(report.left_out[:8]) + (", …" if len(report.left_out) > 8 else "")
        lines.append(f"left out: {shown}")
    what = report.format or "files"
    did = f"would fetch {total} to" if report.dry_run else f"wrote {what}, {total}, to"
    checked = "" if report.dry_run else "; every file matches the Hub"
    lines.append(f"{did} {report.target}{checked}")
    if report.base_model:
        at = f"@{report.base_revision}" if report.base_revision else ""
        where = f" in {report.base_path}" if report.base_path else ""
        lines.append(f"base {report.base_model}{at}{where}")
    lines += [f"note: {note}" for note in report.notes]
    return "\n".join(lines)
