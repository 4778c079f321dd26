"""Data class of a demo step: command, report, measurements."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from loraformat.demo.measure import Measure, Measured

__all__ = ["Step", "measure_steps"]


@dataclass(slots=True)
class Step:
    """Result of one verb on the small adapters.

    Attributes
    ----------
    title : str
        What came out.
    command : str
        What to type for it in the demo's directory.
    result : str
        What the verb reports, in a line.
    path : Path
        What was made.
    seconds : float
    figures : dict of str to float
        The numbers of that line.
    measured : str or None
        Whether it is measured as a model, or as an adapter on the bundle.
    kinds : tuple of str
        The kinds of text that say something about it.
    perplexity : dict of str to Perplexity
        By kind of text; filled by `measure_steps`.
    """

    title: str
    command: str
    result: str
    path: Path
    seconds: float
    figures: dict[str, float] = field(default_factory=dict)
    measured: Literal["model", "adapter"] | None = None
    kinds: tuple[str, ...] = ("manual",)
    perplexity: Measured = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Size of all output files in bytes."""
        files = self.path.rglob("*") if self.path.is_dir() else [self.path]
        return sum(path.stat().st_size for path in files if path.is_file())

    def to_json(self) -> dict[str, Any]:
        """Return the members for ``--json``."""
        return {
            "title": self.title,
            "command": self.command,
            "result": self.result,
            "path": str(self.path),
            "bytes": self.nbytes,
            "seconds": self.seconds,
            "figures": self.figures,
            "perplexity": {kind: p.perplexity for kind, p in self.perplexity.items()},
        }


def measure_steps(steps: Sequence[Step], bundle: Path, measure: Measure) -> None:
    """Fill in perplexities; the bundle is loaded once for all adapters.

    Parameters
    ----------
    steps : sequence of Step
        Changed in place.
    bundle : Path
        The base of all adapters.
    measure : Measure
    """
    adapters = [step for step in steps if step.measured == "adapter"]
    found = measure.with_adapters(bundle, [(step.path, step.kinds) for step in adapters])
    for step, perplexity in zip(adapters, found, strict=True):
        step.perplexity = perplexity
    for step in steps:
        if step.measured == "model":
            step.perplexity = measure.model(step.path, step.kinds)
