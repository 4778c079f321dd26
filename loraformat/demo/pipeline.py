"""The demo: the small real model through every conversion, with its perplexity.

safetensors → bundle → safetensors, and bundle → bitsandbytes. Nothing here is special to
the demo: each step is what the verb of the same name does.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from loraformat.demo import HELDOUT, SMALL_MODEL
from loraformat.demo.perplexity import Perplexity, perplexity
from loraformat.errors import LoraFormatError
from loraformat.ops.convert import convert
from loraformat.ops.describe import ModelSummary, describe
from loraformat.ops.report import ConversionReport
from loraformat.ops.verify import verify

__all__ = ["DemoReport", "Step", "run_demo"]


@dataclass(frozen=True, slots=True)
class Step:
    """One model of the demo.

    Attributes
    ----------
    title : str
    path : Path
    summary : ModelSummary
    seconds : float
        That making it took; 0 for the original.
    perplexity : Perplexity or None
        On the held-out text; None if what measures it is not installed.
    """

    title: str
    path: Path
    summary: ModelSummary
    seconds: float
    perplexity: Perplexity | None


@dataclass(slots=True)
class DemoReport:
    """All that the demo has to show.

    Attributes
    ----------
    steps : list of Step
    errors_by_kind : dict of str to float
        Relative RMS error of quantization.
    notes : list of str
    seconds : float
    """

    steps: list[Step] = field(default_factory=list)
    errors_by_kind: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Return the members for ``--json``."""
        return {
            "steps": [_step_json(step) for step in self.steps],
            "errors_by_kind": self.errors_by_kind,
            "notes": self.notes,
            "seconds": self.seconds,
        }


def _step_json(step: Step) -> dict[str, Any]:
    measured = step.perplexity
    return {
        "title": step.title,
        "path": str(step.path),
        "format": step.summary.format,
        "weight_bytes": step.summary.weight_bytes,
        "bits_per_weight": step.summary.bits_per_weight,
        "quantized_bits_per_weight": step.summary.quantized_bits_per_weight,
        "seconds": step.seconds,
        "perplexity": measured.perplexity if measured else None,
        "bits_per_byte": measured.bits_per_byte if measured else None,
    }


def run_demo(
    directory: Path, *, force: bool = False, say: Callable[[str], None] = lambda line: None
) -> DemoReport:
    """Run the demo.

    Parameters
    ----------
    directory : Path
        Where the models are put; made if it does not exist.
    force : bool
        Replace the models of an earlier run.
    say : callable
        Told what is being done.

    Returns
    -------
    DemoReport

    Raises
    ------
    LoraFormatError
        If a step fails, or the bundle does not verify.
    """
    began = time.perf_counter()
    directory.mkdir(parents=True, exist_ok=True)
    report = DemoReport()
    text = HELDOUT.read_text(encoding="utf-8")
    measure = _Perplexities(text, report.notes)

    def step(title: str, path: Path, seconds: float = 0.0) -> None:
        say(f"measuring {title}")
        report.steps.append(Step(title, path, _summary(path), seconds, measure(path)))

    def make(source: Path, name: str, format_name: str) -> ConversionReport:
        say(f"converting {source.name} to {format_name}")
        report = convert(source, directory / name, to_format=format_name, force=force)
        assert isinstance(report, ConversionReport)
        return report

    step("original", SMALL_MODEL)
    bundled = make(SMALL_MODEL, "bundle", "loraformat")
    report.errors_by_kind = bundled.errors_by_kind
    bundle = directory / "bundle"
    if findings := verify(bundle).findings:
        raise LoraFormatError(f"the bundle breaks rule {findings[0].rule}", path=bundle)
    step("bundle", bundle, bundled.seconds)
    for name, format_name in (("dense", "safetensors"), ("bitsandbytes", "bitsandbytes")):
        made = make(bundle, name, format_name)
        step(name, directory / name, made.seconds)
    report.seconds = time.perf_counter() - began
    return report


def _summary(path: Path) -> ModelSummary:
    summary = describe(path)
    assert isinstance(summary, ModelSummary)
    return summary


class _Perplexities:
    """Measures what the installed packages can open, and notes once what they cannot."""

    def __init__(self, text: str, notes: list[str]) -> None:
        self.text = text
        self.dense = find_spec("transformers") is not None
        self.nf4 = self.dense and all(map(find_spec, ("bitsandbytes", "accelerate")))
        if not self.dense:
            notes.append("perplexity is not measured; run: pip install 'loraformat[demo]'")
        elif not self.nf4:
            notes.append(
                "4-bit models are measured through the dense one, which has the same values; "
                "to open them in transformers, run: pip install bitsandbytes accelerate"
            )

    def __call__(self, path: Path) -> Perplexity | None:
        quantized = _summary(path).quantized_parameters > 0
        if not (self.nf4 if quantized else self.dense):
            return None
        return perplexity(path, self.text)
