"""``loraformat demo``."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from loraformat.cli.console import clean, echo_json, report_options, table
from loraformat.storage.byte_sizes import format_size

_EXAMPLE = """\b
Example:
  loraformat demo
  loraformat demo /tmp/demo --force --json
"""


@click.command(epilog=_EXAMPLE)
@click.argument(
    "directory", default="loraformat-demo", type=click.Path(path_type=Path, file_okay=False)
)
@click.option("--force", is_flag=True, help="Replace the output of an earlier run.")
@report_options
def command(directory: Path, force: bool, as_json: bool, quiet: bool) -> None:
    """Run every verb on the small model and the adapters that ship with loraformat.

    Outputs go to DIRECTORY. The demo also trains an adapter and runs it in llama.cpp. Perplexity is
    measured on held-out text.
    """
    from loraformat.demo.pipeline import demo

    _silence_transformers()

    report = demo(directory, force=force, progress=not quiet)
    if as_json:
        echo_json("demo", report.to_dict())
    elif not quiet:
        click.echo(_text(report, directory))


def _silence_transformers() -> None:
    """Silence other libraries' progress bars and warnings."""
    import logging
    import os
    import warnings

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    with suppress(ImportError):
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()


def _text(report: Any, directory: Path) -> str:
    original, bundle = (model.summary for model in report.bases.models[:2])
    lines = [
        f"The small real model: {original.parameters:,} parameters, "
        f"{bundle.quantized_parameters:,} of them in linears of its layers.",
        "",
        _models(report),
        "",
        f"In NF4: {bundle.quantized_bits_per_weight:.3f} bits per weight; embeddings and norms "
        "are not quantized, which matters in a model this small.",
        "",
        "Two adapters, trained on the NF4 values: manual learned Python's language reference,",
        "tests learned unit tests; learned is trained here. Perplexity on held-out text of each "
        "kind:",
        "",
        _adapters(report),
        "",
        *_training(report),
        *_llama_cpp(report),
        _verbs(report),
        "",
        *[f"note: {note}" for note in report.notes],
        f"Total time: {report.seconds:.0f} seconds. Next steps:",
        f"  loraformat info {directory / 'bundle'}",
        f"  loraformat verify {directory / 'bundle'}",
        f"  loraformat spectrum {directory / 'both'}",
        "  loraformat convert org/model my-bundle        (any model on the Hub)",
    ]
    return "\n".join(lines)


def _models(report: Any) -> str:
    rows = [
        [
            model.title,
            model.summary.format,
            format_size(model.summary.weight_bytes),
            f"{model.summary.bits_per_weight:.3f}",
            _figure(model, "library", 4),
            f"{model.seconds:.2f}" if model.seconds else "-",
        ]
        for model in report.bases.models
    ]
    return table(["model", "format", "weights", "bits/weight", "perplexity", "seconds"], rows)


def _adapters(report: Any) -> str:
    measured = [*report.bases.models[:2], *(step for step in report.steps if step.measured)]
    kinds = ("manual", "tests", "library")
    rows = [[step.title, *(_figure(step, kind, 2) for kind in kinds)] for step in measured]
    return table(["", *kinds], rows)


def _training(report: Any) -> list[str]:
    found = report.training
    if found is None:
        return []
    learned, told = dict(found.losses), dict(found.held_out)
    rows = [
        ["training loss", *(f"{learned[step]:.3f}" if step in learned else "-" for step in told)],
        ["held-out loss", *(f"{loss:.3f}" for loss in told.values())],
    ]
    return [
        f"An adapter trained on {format_size(found.text_bytes)} of the language reference, "
        "excluding the held-out topics:",
        "",
        table(["step", *map(str, told)], rows),
        "",
        f"Perplexity on held-out topics: {found.before:.2f} before, {found.after:.2f} after. "
        "A sample:",
        "",
        *_indented(f"{found.prompt}⟦{found.sample}⟧"),
        "",
        *([f"The loss curve: {found.curve}", ""] if found.curve else []),
    ]


def _llama_cpp(report: Any) -> list[str]:
    if not report.agreements:
        return []
    first = report.agreements[0]
    rows = [
        [
            one.title,
            f"{one.difference:.1e}",
            f"{one.perplexity:.4f}",
            f"{one.ours:.4f}",
            _word(one.same_tokens),
            _word(one.same_next),
            _word(one.same_text),
        ]
        for one in report.agreements
    ]
    heads = ["", "difference", "perplexity", "ours", "tokenizer", "next token", "continuation"]
    return [
        f"Agreement with llama.cpp after {first.positions} tokens of held-out text: largest "
        f"difference among {first.vocabulary:,}",
        "log-probabilities each, perplexity, and whether tokenizer, next token and continuation "
        "agree:",
        "",
        table(heads, rows),
        "",
        *_indented(f"{first.prompt}⟦{first.text}⟧"),
        "",
    ]


def _word(same: bool) -> str:
    return "same" if same else "different"


def _indented(text: str) -> list[str]:
    return [f"  {clean(line)}".rstrip() for line in text.split("\n")]


def _figure(step: Any, kind: str, digits: int) -> str:
    return f"{step.perplexity[kind].perplexity:.{digits}f}" if kind in step.perplexity else "-"


def _verbs(report: Any) -> str:
    done = (step for step in report.steps if step.command)
    return "\n".join(f"loraformat {step.command}\n    {step.result}" for step in done)
