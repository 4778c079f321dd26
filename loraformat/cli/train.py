"""``loraformat train``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

import loraformat
from loraformat.cli.console import Resumable, report_options, show
from loraformat.cli.train_options import SectionedCommand, given_settings, setting_options
from loraformat.errors import InputError

_EXAMPLE = """\b
Example:
  loraformat train my-bundle data.jsonl -o my-adapter --rank 16 --alpha 32 --epochs 1
  loraformat train my-bundle data.jsonl -o my-adapter --dry-run --max-memory 4GB
  loraformat train --config run.yaml --lr 1e-4
  loraformat train my-bundle data.jsonl -o my-adapter --resume
  torchrun --nproc-per-node 2 -m loraformat train my-bundle data.jsonl -o my-adapter
"""


@click.command(
    cls=SectionedCommand,
    epilog=_EXAMPLE,
    params=[
        click.Argument(["base"], required=False),
        click.Argument(["data"], nargs=-1),
        click.Option(["-o", "--output"], metavar="ADAPTER", help="The new adapter."),
        click.Option(
            ["--config"], type=click.Path(path_type=Path), metavar="FILE",
            help="YAML file with any of these options, base, data and output; flags override it.",
        ),
        click.Option(
            ["--resume"], is_flag=True, help="Resume from the newest complete checkpoint."
        ),
        *setting_options(),
        click.Option(
            ["--force"], is_flag=True, help="Replace an existing adapter and its run directory."
        ),
        click.Option(
            ["--dry-run"], is_flag=True,
            help="Print the memory plan, the number of steps and a measured time estimate without "
            "training.",
        ),
    ],
)  # fmt: skip
@report_options
def command(
    config: Path | None,
    resume: bool,
    force: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    **given: Any,
) -> None:
    """Train a LoRA adapter on a bundle that need not fit in memory.

    BASE is a bundle, DATA are JSONL, JSON, CSV, Parquet or text files, directories of them, or
    datasets on the Hub, with rows of {"text"}, {"prompt", "completion"} or {"messages"}. The base
    is memory-mapped from disk; each layer is dequantized when it is needed and released afterwards.

    Checkpoints, the training record and the loss curve are written to ADAPTER.run. After Ctrl-C or
    a crash, the same command with --resume produces the same bytes as an uninterrupted run.
    """
    from loraformat.cli.train_progress import TrainingBar

    options: dict[str, Any] = {"base": "", "data": (), "output": ""}
    options |= given_settings(given, config or _config_of_run(given, resume))
    if config is not None and options["output"]:
        _keep_config(config, Path(options["output"]))
    with TrainingBar(quiet=quiet or not _leads(), plan=not dry_run) as bar:
        try:
            report = loraformat.train(
                **options, resume=resume, force=force, dry_run=dry_run, progress=bar
            )
        except KeyboardInterrupt:
            if _leads():
                raise Resumable from None
            raise click.exceptions.Exit(130) from None
    if _leads():
        lines = report.plan_lines() if dry_run else report.done_lines()
        lines += [f"note: {note}" for note in report.notes[bar.notes_told :]]
        show("train", report, lambda report: "\n".join(lines), as_json=as_json, quiet=quiet)


def _keep_config(config: Path, output: Path) -> None:
    """Refuse an output that would overwrite the config file."""
    from loraformat.storage.output_rules import refuse_input_as_output
    from loraformat.train.run.run_directory import RunDirectory

    run = RunDirectory(output)
    if config.resolve() != run.config.resolve():  # a run's own is what --resume goes on with
        refuse_input_as_output(output.absolute(), run.path, [config])


def _config_of_run(given: dict[str, Any], resume: bool) -> Path | None:
    """Return the options of the run to resume, so that ``-o ADAPTER --resume`` is enough.

    Raises
    ------
    InputError
        If there is no such run, and nothing that says how to begin one.
    """
    if not resume or not given["output"]:
        return None
    from loraformat.train.run.run_directory import RunDirectory

    directory = RunDirectory(Path(given["output"]))
    if directory.config.is_file():
        return directory.config
    if not given["base"]:
        raise InputError(
            "contains no run to resume", path=directory.path,
            hint="give the --output of the interrupted run, or base and data to start a new one",
        )  # fmt: skip
    return None


def _leads() -> bool:
    """Tell whether this process prints: the first of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"
