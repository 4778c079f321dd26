"""Demo, part 1: conversions of the small model.

safetensors → bundle → safetensors, and bundle → bitsandbytes, each with its perplexity.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loraformat.demo import SMALL_MODEL
from loraformat.demo.measure import Measure, Measured, summary_of
from loraformat.demo.step import Workspace
from loraformat.errors import LoraFormatError
from loraformat.model.description import ModelInfo
from loraformat.ops.convert.convert import convert
from loraformat.ops.convert.report import ConversionReport
from loraformat.ops.verify import verify

__all__ = ["Bases", "Model", "convert_bases"]


@dataclass(frozen=True, slots=True)
class Model:
    """One model of this part of the demo.

    `seconds` is what making it took, 0 for the original; `perplexity`, by kind of text, is empty
    if what measures it is not installed.
    """

    title: str
    path: Path
    summary: ModelInfo
    seconds: float
    perplexity: Measured

    def to_json(self) -> dict[str, Any]:
        """Return the members for ``--json``."""
        return {
            "title": self.title,
            "path": str(self.path),
            "format": self.summary.format,
            "weight_bytes": self.summary.weight_bytes,
            "bits_per_weight": self.summary.bits_per_weight,
            "quantized_bits_per_weight": self.summary.quantized_bits_per_weight,
            "seconds": self.seconds,
            "perplexity": {kind: p.perplexity for kind, p in self.perplexity.items()},
            "bits_per_byte": {kind: p.bits_per_byte for kind, p in self.perplexity.items()},
        }


@dataclass(slots=True)
class Bases:
    """Results of this part of the demo; `errors_by_kind` are relative RMS, of quantization."""

    models: list[Model] = field(default_factory=list)
    errors_by_kind: dict[str, float] = field(default_factory=dict)


def convert_bases(work: Workspace, measure: Measure) -> Bases:
    """Convert the small model to ``bundle``, ``dense`` and ``bitsandbytes``, and measure them.

    Raises
    ------
    LoraFormatError
        If a conversion fails, or the bundle does not verify.
    """
    bases, bundle = Bases(), work.bundle

    def add(title: str, path: Path, seconds: float = 0.0) -> None:
        work.say(f"measuring {title}")
        # What the bundle is worth for the adapters' texts, too, is asked in the next chapter.
        kinds = ("library", "manual", "tests") if title in ("original", "bundle") else ("library",)
        found = measure.model(path, kinds)
        bases.models.append(Model(title, path, summary_of(path), seconds, found))

    def make(source: Path, name: str, format_name: str) -> ConversionReport:
        work.say(f"converting {source.name} to {format_name}")
        report = convert(source, work.directory / name, to_format=format_name, force=work.force)
        assert isinstance(report, ConversionReport)
        return report

    add("original", SMALL_MODEL)
    bundled = make(SMALL_MODEL, "bundle", "loraformat")
    bases.errors_by_kind = bundled.errors_by_kind
    if findings := verify(bundle).findings:
        raise LoraFormatError(f"the bundle breaks rule {findings[0].rule}", path=bundle)
    add("bundle", bundle, bundled.seconds)
    for name, format_name in (("dense", "safetensors"), ("bitsandbytes", "bitsandbytes")):
        add(name, work.directory / name, make(bundle, name, format_name).seconds)
    return bases
