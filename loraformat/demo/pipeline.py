"""The demo pipeline: every verb on the small model and its adapters, with perplexities.

Nothing here is special to the demo: each step is what the verb of the same name does.
"""

from __future__ import annotations

import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from loraformat.demo.bases import Bases, convert_bases
from loraformat.demo.exporting import Agreement, compare_with_llama_cpp, export
from loraformat.demo.measure import Measure
from loraformat.demo.merging import add_adapters, merge_and_undo
from loraformat.demo.shaping import shape_adapters
from loraformat.demo.step import Step, Workspace, measure_steps
from loraformat.demo.training import Training, train_adapter
from loraformat.model.report import Report

__all__ = ["DemoReport", "demo"]


@dataclass(frozen=True, slots=True, repr=False)
class DemoReport(Report):
    """Report of the demo.

    Attributes
    ----------
    bases : Bases
        The model in every format.
    steps : list of Step
        What was done with adapters.
    training : Training or None
        What was trained; None without transformers.
    agreements : list of Agreement
        How nearly llama.cpp computes the same; empty without xllamacpp.
    """

    bases: Bases
    steps: list[Step] = field(default_factory=list)
    training: Training | None = None
    agreements: list[Agreement] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return the members for ``--json``."""
        return {
            "models": [model.to_json() for model in self.bases.models],
            "errors_by_kind": self.bases.errors_by_kind,
            "adapters": [step.to_json() for step in self.steps],
            "training": None if self.training is None else self.training.to_json(),
            "llama_cpp": [asdict(agreement) for agreement in self.agreements],
            "notes": self.notes,
            "seconds": self.seconds,
        }


def demo(
    directory: str | Path = "loraformat-demo", *, force: bool = False, progress: bool = False
) -> DemoReport:
    """Run every verb on the small model and the adapters that ship with loraformat.

    Parameters
    ----------
    directory : str or Path
        Where models and adapters go.
    force : bool
        Replace the output of an earlier run.
    progress : bool
        Print a line about each step on stderr.

    Returns
    -------
    DemoReport

    Raises
    ------
    LoraFormatError
        If a step fails, the bundle does not verify, or undoing a merge gives anything but the
        original.
    """

    def say(line: str) -> None:
        if progress:
            sys.stderr.write(f"... {line}\n")

    began = time.perf_counter()
    work = Workspace(Path(directory), say, force)
    work.directory.mkdir(parents=True, exist_ok=True)
    measure = Measure(work.notes)
    bases = convert_bases(work, measure)
    steps = [*add_adapters(work), *merge_and_undo(work), *shape_adapters(work)]
    training, trained = train_adapter(work)
    steps += trained
    agreements = []
    if training is not None:
        steps += export(work)
        agreements = compare_with_llama_cpp(work)
    say("measuring adapters and merged models")
    measure_steps(steps, work.bundle, measure)
    seconds = time.perf_counter() - began
    return DemoReport(bases, steps, training, agreements, notes=work.notes, seconds=seconds)
