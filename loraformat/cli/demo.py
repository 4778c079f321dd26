"""``loraformat demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from loraformat.cli.console import echo_json, json_option, quiet_option, size, table

_EXAMPLE = """\b
Example:
  loraformat demo
  loraformat demo /tmp/demo --force --json
"""


@click.command(epilog=_EXAMPLE)
@click.argument(
    "directory", default="loraformat-demo", type=click.Path(path_type=Path, file_okay=False)
)
@click.option("--force", is_flag=True, help="Replace the models of an earlier run.")
@json_option
@quiet_option
def command(directory: Path, force: bool, as_json: bool, quiet: bool) -> None:
    """Run the whole pipeline on the small real model that ships with loraformat.

    The models are put into DIRECTORY. Perplexity is measured on held-out text.
    """
    from loraformat.demo.pipeline import run_demo

    _silence_transformers()

    def say(line: str) -> None:
        if not quiet:
            click.echo(f"... {line}", err=True)

    report = run_demo(directory, force=force, say=say)
    if as_json:
        echo_json("demo", report.to_json())
    elif not quiet:
        click.echo(_text(report, directory))


def _silence_transformers() -> None:
    """Keep other libraries' bars and warnings from running through ours."""
    import logging
    import os

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        from transformers.utils.logging import disable_progress_bar
    except ImportError:
        return
    disable_progress_bar()


def _text(report: Any, directory: Path) -> str:
    rows = [
        [
            step.title,
            step.summary.format,
            size(step.summary.weight_bytes),
            f"{step.summary.bits_per_weight:.3f}",
            f"{step.perplexity.perplexity:.4f}" if step.perplexity else "-",
            f"{step.perplexity.bits_per_byte:.4f}" if step.perplexity else "-",
            f"{step.seconds:.2f}" if step.seconds else "-",
        ]
        for step in report.steps
    ]
    head = ["model", "format", "weights", "bits/weight", "perplexity", "bits/byte", "seconds"]
    bundle = report.steps[1].summary
    errors = [[kind, f"{error:.4f}"] for kind, error in report.errors_by_kind.items()]
    lines = [
        f"The small real model: {report.steps[0].summary.parameters:,} parameters, "
        f"{bundle.quantized_parameters:,} of them in linears of its layers.",
        "",
        table(head, rows),
        "",
        f"In NF4: {bundle.quantized_bits_per_weight:.3f} bits per weight; embeddings and norms "
        "stay plain, and in a model this small they weigh much.",
        "",
        table(["quantized", "relative RMS error"], errors),
        "",
        *[f"note: {note}" for note in report.notes],
        f"All of it took {report.seconds:.1f} seconds. Try next:",
        f"  loraformat info {directory / 'bundle'} --tensors",
        f"  loraformat verify {directory / 'bundle'}",
        f"  loraformat convert {directory / 'bundle'} my-model --to safetensors --dtype f32",
        "  loraformat convert org/model my-bundle        (any model on the Hub)",
    ]
    return "\n".join(lines)
