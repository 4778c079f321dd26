"""``loraformat push``."""

from __future__ import annotations

from typing import Any

import click

from loraformat.cli.console import on_terminal, report_options, show, table
from loraformat.cli.options import dry_run_option
from loraformat.storage.byte_sizes import format_size

_EXAMPLE = """\b
Example:
  loraformat push my-adapter me/my-adapter --dry-run
  loraformat push my-adapter me/my-adapter --with-gguf --tag v1.0
  loraformat push my-bundle/adapters/medical me/medical --private
  loraformat push my-bundle me/my-bundle
"""


@click.command(epilog=_EXAMPLE)
@click.argument("path")
@click.argument("repo", metavar="REPO_ID")
@click.option(
    "--base-model",
    metavar="ORG/NAME",
    help="Base model on the Hub, if the files record only a local path. ORG/NAME@REVISION selects "
    "a revision.",
)
@click.option(
    "--license",
    metavar="ID",
    help="Licence identifier as used on the Hub. [default: that of the base]",
)
@click.option(
    "--with-gguf", is_flag=True, help="Also publish a GGUF version of the adapter for llama.cpp."
)
@click.option(
    "--base",
    metavar="PATH",
    help="Base to compare names and shapes with; its config.json is used for --with-gguf. "
    "[default: a local copy, if there is one]",
)
@click.option(
    "--include",
    multiple=True,
    metavar="GLOB",
    help="Also publish matching files of PATH. Repeatable.",
)
@click.option(
    "--exclude",
    multiple=True,
    metavar="GLOB",
    help="Do not publish matching files of PATH. Repeatable.",
)
@click.option(
    "--with-statistics",
    is_flag=True,
    help="Also publish activation statistics: second moments of layer inputs on the training data.",
)
@click.option(
    "--whole-record",
    is_flag=True,
    help="Keep hashes of the training data and sample prompts in the published "
    "training_record.json.",
)
@click.option("--private", is_flag=True, help="Create a new repository as private.")
@click.option(
    "--revision", metavar="BRANCH", help="Branch to commit to; created if missing.  [default: main]"
)
@click.option(
    "--create-pr", is_flag=True, help="Open a pull request instead of committing to the branch."
)
@click.option("--tag", metavar="NAME", help="Tag the commit, for example v1.0.")
@click.option("--message", metavar="TEXT", help="Commit message.")
@dry_run_option("Print the files, their status on the Hub, and the model card, without uploading.")
@report_options
def command(path: str, repo: str, as_json: bool, quiet: bool, **options: Any) -> None:
    """Publish an adapter or a bundle on the Hub with a generated model card.

    PATH is a PEFT directory, a GGUF LoRA, BUNDLE/adapters/NAME, or a bundle. It is verified first
    and published in a single commit, whose files are then compared by hash. Files already on the
    Hub are not uploaded again, so an interrupted upload resumes where it stopped.

    Log in with: hf auth login.
    """
    from loraformat.ops.push.push import push

    report = push(path, repo, progress=on_terminal(quiet), **options)
    show("push", report, _text, as_json=as_json, quiet=quiet)


def _text(report: Any) -> str:
    rows = [[file.path, format_size(file.bytes), file.status] for file in report.files]
    lines = [f"{report.kind} {report.source}, of {report.base_model}", ""]
    lines += [table(["file", "size", "on the Hub"], rows), ""]
    lines += [f"removed: {path}" for path in report.removed]
    if report.left_out:
        shown = ", ".join(report.left_out[:8]) + (", …" if len(report.left_out) > 8 else "")
        lines.append(f"left out: {shown} (add them with --include GLOB)")
    lines += [f"note: {note}" for note in report.notes]
    if report.dry_run:
        lines += ["README.md would be:", "", report.card]
        return "\n".join(lines)
    if not report.changed:
        lines.append(f"unchanged since commit {report.commit[:12]}")
    else:
        lines.append(f"commit {report.commit[:12]}, every file verified by hash")
    if report.tag:
        lines.append(f"tag {report.tag}")
    lines.append(report.pull_request or report.url)
    return "\n".join(lines)
