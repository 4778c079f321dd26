"""``loraformat generate``."""

from __future__ import annotations

import sys
from typing import Any

import click

from loraformat.cli.console import echo_json, report_options
from loraformat.cli.train_options import chosen, machine_settings, setting_options
from loraformat.errors import InputError, UsageError

_EXAMPLE = """\b
Example:
  loraformat generate my-bundle --prompt "Once upon a time" --max-tokens 64
  loraformat generate my-bundle --adapter my-adapter --chat --prompt "What is NF4?"
"""


@click.command(epilog=_EXAMPLE)
@click.argument("base")
@click.option("--adapter", metavar="ADAPTER", help="Apply this adapter.")
@click.option("--prompt", metavar="TEXT", help="Prompt text; - reads it from stdin.",
              required=True)  # fmt: skip
@click.option("--chat", is_flag=True,
              help="Apply the adapter's chat template, or the model's, to the prompt.")  # fmt: skip
@click.option("--system", metavar="TEXT", help="With --chat: the system message.")
@click.option("--max-tokens", type=int, default=256, show_default=True, metavar="N",
              help="Maximum number of new tokens.")  # fmt: skip
@click.option("--temperature", type=float, default=0.7, show_default=True, metavar="T",
              help="Sampling temperature; 0 is greedy decoding.")  # fmt: skip
@click.option("--top-p", type=float, default=0.95, show_default=True, metavar="P",
              help="Nucleus sampling: sample from the smallest set of tokens with this total "
                   "probability.")  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True, metavar="N",
              help="Random seed for sampling.")  # fmt: skip
@setting_options(machine_settings())
@report_options
def command(
    adapter: str | None,
    prompt: str,
    chat: bool,
    system: str | None,
    max_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    as_json: bool,
    quiet: bool,
    **given: Any,
) -> None:
    """Generate text from a prompt and print it token by token.

    BASE is a bundle or a model in any other format: a safetensors directory, a bitsandbytes
    checkpoint or a GGUF file. It is memory-mapped, so a model larger than memory works, slowly.
    """
    if system and not chat:
        raise UsageError("--system needs --chat", hint="add --chat")
    options = chosen({**given, "adapter": adapter}, None)
    text = _stdin() if prompt == "-" else prompt
    from loraformat.train.run.generate import generate
    from loraformat.train.run.text_generation import GenerationOptions

    drawn = GenerationOptions(max_tokens, temperature, top_p, seed)

    def show(piece: str) -> None:
        click.echo(_clean_text(piece), nl=False)
        sys.stdout.flush()

    silent = as_json or quiet
    found = generate(
        options, text, drawn, chat=chat, system=system,
        tell=(lambda piece: None) if silent else show,
    )  # fmt: skip
    if as_json:
        echo_json("generate", found.to_dict())
    elif not quiet:
        click.echo()
        click.echo(f"{found.tokens} tokens, {found.tokens_per_second:.1f} per second", err=True)


def _stdin() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise InputError(f"the prompt on stdin is not UTF-8 at byte {error.start}") from None


def _clean_text(text: str) -> str:
    """Keep line breaks and tabs; nothing else that a model writes may move a cursor."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)
