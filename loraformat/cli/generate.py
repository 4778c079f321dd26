"""``loraformat generate``."""

from __future__ import annotations

import sys
from typing import Any

import click

import loraformat
from loraformat.cli.console import clean, echo_json
from loraformat.cli.options import verb_command
from loraformat.cli.train_options import MACHINE_SETTINGS, given_settings, setting_options
from loraformat.errors import InputError

_EXAMPLE = """\b
Example:
  loraformat generate my-bundle --prompt "Once upon a time" --max-tokens 64
  loraformat generate my-bundle --adapter my-adapter --chat --prompt "What is NF4?"
"""
_PROMPT = click.Option(
    ["--prompt"], metavar="TEXT", required=True, help="Prompt text; - reads it from stdin."
)


def _run(prompt: str, as_json: bool, quiet: bool, **options: Any) -> None:
    def show(piece: str) -> None:
        click.echo(clean(piece, keep="\n\t"), nl=False)
        sys.stdout.flush()

    text = _stdin() if prompt == "-" else prompt
    silent = as_json or quiet
    found = loraformat.generate(
        prompt=text, **given_settings(options), progress=False if silent else show
    )
    if as_json:
        echo_json("generate", found.to_dict())
    elif not quiet:
        click.echo()
        for note in found.notes:
            click.echo(f"note: {note}", err=True)
        click.echo(f"{found.tokens} tokens, {found.tokens_per_second:.1f} per second", err=True)


def _stdin() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise InputError(f"the prompt on stdin is not UTF-8 at byte {error.start}") from None


command = verb_command(
    "generate",
    _EXAMPLE,
    _run,
    summary="Generate text from a prompt and print it token by token.",
    only=("base", "adapter", "chat", "system", "max_tokens", "temperature", "top_p", "seed"),
    metavars={"max_tokens": "N", "system": "TEXT", "temperature": "T", "top_p": "P"},
    extra={"chat": [_PROMPT]},
    settings=setting_options(MACHINE_SETTINGS),
)
