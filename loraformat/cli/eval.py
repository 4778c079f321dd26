"""``loraformat eval``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from loraformat.cli.console import echo_json, report_options, say, table
from loraformat.cli.sections import SectionedCommand
from loraformat.cli.train_options import chosen, data_settings, machine_settings, setting_options

_EXAMPLE = """\b
Example:
  loraformat eval my-bundle held-out.jsonl --adapter my-adapter
  loraformat eval my-bundle held-out.txt --adapter first --adapter second --json
"""


@click.command(cls=SectionedCommand, epilog=_EXAMPLE)
@click.argument("base")
@click.argument("data", nargs=-1, required=True)
@click.option(
    "--adapter", multiple=True, metavar="ADAPTER",
    help="Also measure the base with this adapter. Repeatable.",
)  # fmt: skip
@setting_options((*data_settings(), *machine_settings()))
@report_options
def command(adapter: tuple[str, ...], as_json: bool, quiet: bool, **given: Any) -> None:
    """Measure loss and perplexity of a base on held-out data, without and with each adapter.

    The loss is the mean negative log-likelihood of the target tokens in nats; perplexity is its
    exponential. Data formats and loss masks are those of training. BASE is a bundle or a model in
    any other format: a safetensors directory, a bitsandbytes checkpoint or a GGUF file.
    """
    options = chosen(given, None)
    from loraformat.cli.train_progress import TrainingBar
    from loraformat.train.run.evaluate import evaluate

    with TrainingBar(quiet=quiet) as bar:
        found = evaluate(options, adapter, tell=bar.batches, progress=bar.rows)
    if as_json:
        echo_json("eval", found.to_dict())
    elif not quiet:
        base = found.losses[found.base].loss
        rows = [
            [Path(name).name, f"{one.loss:.4f}", f"{one.perplexity:.4f}", f"{one.loss - base:+.4f}"]
            for name, one in found.losses.items()
        ]
        tokens = found.losses[found.base].tokens
        say(table(["model", "loss", "perplexity", "loss change"], rows))
        say(f"\n{tokens:,} tokens")
        for note in found.notes:
            say(f"note: {note}")
