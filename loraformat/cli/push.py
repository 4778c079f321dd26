"""``loraformat push``."""

from __future__ import annotations

from typing import Any

import click

from loraformat.cli.console import (
    echo_json,
    json_option,
    progress_bar,
    quiet_option,
    say,
    size,
    table,
)
from loraformat.cli.options import dry_run_option
from loraformat.cli.template_pieces import format_of

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
    help="The base on the Hub, where the files know a local path only. ORG/NAME@REVISION, too.",
)
@click.option(
    "--license",
    "licence",
    metavar="ID",
    help="The Hub's identifier of the licence; by default that of the base.",
)
@click.option(
    "--with-gguf", is_flag=True, help="Publish an adapter for llama.cpp, too, made from PATH."
)
@click.option(
    "--base",
    metavar="PATH",
    help="The base, to hold names and shapes against, and whose config.json serves --with-gguf. "
    "[default: a copy that is here already]",
)
@click.option(
    "--include", multiple=True, metavar="GLOB", help="Publish these files of PATH, too. Repeatable."
)
@click.option(
    "--exclude", multiple=True, metavar="GLOB", help="Leave these files of PATH here. Repeatable."
)
@click.option(
    "--with-statistics",
    is_flag=True,
    help="Publish activation statistics, too: moments of what the training data made layers see.",
)
@click.option(
    "--whole-record",
    is_flag=True,
    help="Publish hashes of the training data, and prompts of samples, in training_record.json.",
)
@click.option("--private", is_flag=True, help="Make a new repository private.")
@click.option(
    "--revision", metavar="BRANCH", help="Branch, made if it is missing.  [default: main]"
)
@click.option("--create-pr", is_flag=True, help="Propose it as a pull request.")
@click.option("--tag", metavar="NAME", help="Tag the commit, v1.0 for example.")
@click.option("--message", metavar="TEXT", help="Message of the commit.")
@dry_run_option("Print the files, how they compare with what the Hub has, and the card.")
@json_option
@quiet_option
def command(path: str, repo: str, as_json: bool, quiet: bool, **options: Any) -> None:
    """Publish an adapter or a bundle on the Hub, with a card written from its facts.

    PATH is a PEFT directory, a GGUF LoRA, BUNDLE/adapters/NAME, or a bundle. It is verified;
    everything appears in one commit, which is then read again and compared by hash. What the
    Hub has already is not sent again, so an interrupted upload goes on where it was.

    The login is huggingface_hub's: hf auth login.
    """
    from loraformat.ops.push.push import push

    with progress_bar("verify", quiet=quiet) as progress:
        report = push(path, repo, progress=progress, format_of=format_of, **options)
    if as_json:
        echo_json("push", report.to_json())
    elif not quiet:
        say(_text(report))


def _text(report: Any) -> str:
    rows = [[file.path, size(file.bytes), file.status] for file in report.files]
    lines = [f"{report.kind} {report.source}, of {report.base_model}", ""]
    lines += [table(["file", "size", "on the Hub"], rows), ""]
    lines += [f"removed: {path}" for path in report.removed]
    if report.left_out:
        shown = ", ".join(report.left_out[:8]) + (", …" if len(report.left_out) > 8 else "")
        lines.append(f"left out: {shown} (--include GLOB adds them)")
    lines += [f"note: {note}" for note in report.notes]
    if report.dry_run:
        lines += ["README.md would be:", "", report.card]
        return "\n".join(lines)
    if not report.changed:
        lines.append(f"nothing has changed since commit {report.commit[:12]}")
    else:
        lines.append(f"commit {report.commit[:12]}, every file compared by hash")
    if report.tag:
        lines.append(f"tag {report.tag}")
    lines.append(report.pull_request or report.url)
    return "\n".join(lines)
