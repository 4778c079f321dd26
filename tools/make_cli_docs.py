"""Writes ``docs/cli.md`` from the verbs' own ``--help``; ``--check`` fails if it is out of date."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from loraformat.cli import _VERBS, commands

_PAGE = Path(__file__).parent.parent / "docs" / "cli.md"
_WIDTH = 96
_INTRODUCTION = """\
# The command line

Made by `tools/make_cli_docs.py` from each verb's `--help`; do not edit.

{contents}

Data goes to stdout, everything else to stderr. Exit codes:

| code | meaning |
|---|---|
| 0 | done |
| 1 | error |
| 2 | usage: options that contradict each other or do not exist |
| 3 | the input is missing, damaged, hostile, or cannot be expressed |
| 4 | `verify` or `check` found something |
| 5 | the output exists, is the input, or is being written by another process |
| 6 | not enough disk or memory |
| 7 | the network, or the Hugging Face Hub |
| 130 | interrupted; the same command continues |

Verbs, options and paths are completed by the shell once its startup file has this line; for bash
in `~/.bashrc`, for zsh in `~/.zshrc`, for fish in `~/.config/fish/completions/loraformat.fish`:

| shell | line |
|---|---|
| bash | `eval "$(_LORAFORMAT_COMPLETE=bash_source loraformat)"` |
| zsh | `eval "$(_LORAFORMAT_COMPLETE=zsh_source loraformat)"` |
| fish | `_LORAFORMAT_COMPLETE=fish_source loraformat \\| source` |
"""


def _contents() -> str:
    """Return a table of the verbs that leads to their places."""
    rows = [f"| [`{verb}`](#loraformat-{verb}) | {line} |" for verb, line in sorted(_VERBS.items())]
    return "\n".join(["| verb | what it does |", "|---|---|", *rows])


def _page() -> str:
    context = click.Context(commands, info_name="loraformat")
    parts = [_INTRODUCTION.replace("{contents}", _contents())]
    for verb in commands.list_commands(context):
        command = commands.get_command(context, verb)
        assert command is not None
        inner = click.Context(command, info_name=verb, parent=context, max_content_width=_WIDTH)
        inner.terminal_width = _WIDTH
        parts.append(f"\n## loraformat {verb}\n\n```text\n{command.get_help(inner)}\n```\n")
    return "".join(parts)


@click.command()
@click.option("--check", is_flag=True, help="Write nothing; exit 1 if the page would change.")
def main(check: bool) -> None:
    """Write the page, or compare it."""
    page = _page()
    if not check:
        _PAGE.write_text(page, encoding="utf-8")
    elif not _PAGE.exists() or _PAGE.read_text(encoding="utf-8") != page:
        click.echo("docs/cli.md is out of date; run: python tools/make_cli_docs.py", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
