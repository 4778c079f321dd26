"""``loraformat eval``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import loraformat
from loraformat.cli.console import echo_json, say, table
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


command = verb_command(
    "evaluate",
    _EXAMPLE,
    only=("base", "data", "adapter"),
    metavars={"base": "BASE", "data": "DATA..."},
    settings=setting_options([*DATA_SETTINGS, *MACHINE_SETTINGS]),
    cls=SectionedCommand,
)(_run)
