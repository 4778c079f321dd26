"""What the parts of the demo share: where it works, and the record of a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from loraformat.demo.measure import Measure, Measured

__all__ = ["Step", "Workspace", "measure_steps"]


@dataclass(frozen=True, slots=True)
class Workspace:
    """Directory of the demo; `say` takes a line on each step, `notes` what was skipped."""

    directory: Path
    say: Callable[[str], None]
    force: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def bundle(self) -> Path:
        """The small model in NF4, with its adapters."""
        return self.directory / "bundle"

    @property
    def manual(self) -> Path:
        """The adapter of that name, in the bundle."""
        return self.bundle / "adapters" / "manual"

    @property
    def learned(self) -> Path:
        """The adapter that the demo trains."""
        return self.directory / "learned"


@dataclass(slots=True)
class Step:
    """Result of one verb on the small adapters.

    `command` is what to type for it in the demo's directory, `result` what the verb reports in a
    line, with these `figures`, and `path` what was made. It may be `measured` as a model, or as an
    adapter on the bundle, on the `kinds` of text that say something about it; `measure_steps` fills
    in `perplexity`, by kind.
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
    """Fill in perplexities; the bundle, base of all adapters, is loaded once."""
    adapters = [step for step in steps if step.measured == "adapter"]
    found = measure.with_adapters(bundle, [(step.path, step.kinds) for step in adapters])
    for step, perplexity in zip(adapters, found, strict=True):
        step.perplexity = perplexity
    for step in steps:
        if step.measured == "model":
            step.perplexity = measure.model(step.path, step.kinds)
