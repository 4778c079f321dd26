"""``loraformat eval``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import loraformat
from loraformat.cli.console import show, table, with_notes
from loraformat.cli.options import verb_command
from loraformat.cli.train_options import (
    DATA_SETTINGS,
    MACHINE_SETTINGS,
    SectionedCommand,
    given_settings,
    setting_options,
)

_EXAMPLE = """\b
Example:
  loraformat eval my-bundle held-out.jsonl --adapter my-adapter
  loraformat eval my-bundle held-out.txt --adapter first --adapter second --json
"""


def _run(as_json: bool, quiet: bool, **options: Any) -> None:
    from loraformat.cli.train_progress import TrainingBar

    with TrainingBar(quiet=quiet) as bar:
        found = loraformat.evaluate(**given_settings(options), progress=bar)
    show("eval", found, _text, as_json=as_json, quiet=quiet)


def _text(report: Any) -> str:
    base = report.losses[report.base]
    rows = [
        [Path(name).name, f"{m.loss:.4f}", f"{m.perplexity:.4f}", f"{m.loss - base.loss:+.4f}"]
        for name, m in report.losses.items()
    ]
    lines = [table(["model", "loss", "perplexity", "loss change"], rows), ""]
    return with_notes([*lines, f"{base.tokens:,} tokens"], report)


command = verb_command(
    "evaluate",
    _EXAMPLE,
    _run,
    only=("base", "data", "adapter"),
    metavars={"base": "BASE", "data": "DATA..."},
    settings=setting_options([*DATA_SETTINGS, *MACHINE_SETTINGS]),
    cls=SectionedCommand,
)
