"""What a merge reports: what became of each delta, and what to do if too little is left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from shlex import quote
from typing import ClassVar

from loraformat.model.quantization_history import Quantized
from loraformat.ops.merge.measure import Change
from loraformat.ops.report import Report

__all__ = ["MergeReport", "MergedAdapter", "UndoSummary", "advice", "commands"]

#: Above these, half of what training did may be gone: then there is a warning.
_MUCH_ERROR = 0.3
_MUCH_SWALLOWED = 0.2
#: The same for types that round numbers together: their errors are those of the whole weights, and
#: a delta that is lost in each of them may be there on average.
_LITTLE_KEPT = 0.8
#: How many times as large as the delta is what quantizing a quantized base again adds.
_DROWNING = 3.0


@dataclass(frozen=True, slots=True)
class MergedAdapter:
    """One of the adapters: where it was, its format, its weight, its own notes."""

    path: str
    format: str
    weight: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class UndoSummary:
    """The undo record: where it is, its size in bytes and in bits per merged parameter."""

    path: str
    bytes: int
    bits_per_weight: float


@dataclass(frozen=True, slots=True, repr=False)
class MergeReport(Report):
    """What a merge did.

    Attributes
    ----------
    source, target : str
    source_format, target_format : str
    adapters : list of MergedAdapter
    merged, replaced, tensors : int
        Tensors with a delta, tensors with new values, all tensors of the output.
    modules : list of Change
        Of each tensor with a delta.
    total : Change or None
        Of all of them; None of a dry run.
    output_bytes : int
    undo : UndoSummary or None
    beside : str or None
        Name of the adapter in the output, if that keeps the base as it is.
    quantized_before : list of Quantized
        How the base's weights were quantized, as far as it is known.
    notes, warnings, lost : list of str
        What to know, what to worry about, what the source held and the output does not.
    """

    _shared: ClassVar[tuple[str, ...]] = ("notes", "lost", "seconds", "dry_run")

    source: str
    target: str
    source_format: str
    target_format: str
    adapters: list[MergedAdapter]
    merged: int = 0
    replaced: int = 0
    tensors: int = 0
    modules: list[Change] = field(default_factory=list)
    total: Change | None = None
    output_bytes: int = 0
    undo: UndoSummary | None = None
    beside: str | None = None
    quantized_before: list[Quantized] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def advice(
    total: Change, dtypes: Sequence[str], *, requantized: bool, beside: Sequence[str] = ()
) -> list[str]:
    """Say what a user should worry about, and the remedy.

    Parameters
    ----------
    total : Change
    dtypes : sequence of str
        What the merged tensors are stored as: safetensors names, or a format's own.
    requantized : bool
    beside : sequence of str
        Of a base that was quantized already: commands that leave it as it is.

    Examples
    --------
    >>> advice(Change("total", 1e-3, 0.56, 0.77, 0.6, 0), ["BF16"], requantized=False)[0][:50]
    'rounding to bf16 loses much of this small delta (e'
    """
    found = []
    if requantized:
        found.append(
            f"requantizing keeps {total.gain:.1%} of the delta with an error of {total.error:.0%} "
            "of its size; keeping the NF4 codes and a separate adapter loses nothing"
        )
    elif beside and _in_blocks(dtypes):
        if total.gain < _LITTLE_KEPT or total.error > _DROWNING:
            found.append(
                f"the base was already quantized, and quantizing it again keeps {total.gain:.1%} "
                f"of the delta with an error of {total.error:.1f} times its size; use the base "
                "and the adapter separately instead: " + "; ".join(beside)
            )
    elif _much_is_lost(total, dtypes):
        rounded = [name for name in dtypes if name != "F32"] or ["F16"]
        name = "bf16" if "BF16" in rounded else rounded[0].lower()
        better = "--dtype f16 is eight times finer, --dtype f32" if name == "bf16" else "f32"
        found.append(
            f"rounding to {name} loses much of this small delta (error {total.error:.0%} of its "
            f"size, {total.swallowed:.0%} of the weights unchanged); {better} keeps it"
        )
    if total.clipped:
        found.append(
            f"{total.clipped} values exceed the float16 range and were clipped to ±65504; use "
            "--dtype bf16 or f32"
        )
    return found


def _much_is_lost(total: Change, dtypes: Sequence[str]) -> bool:
    if _in_blocks(dtypes):
        return total.gain < _LITTLE_KEPT
    return total.error > _MUCH_ERROR or total.swallowed > _MUCH_SWALLOWED


def _in_blocks(dtypes: Sequence[str]) -> bool:
    return any(name.startswith("Q") for name in dtypes)


def commands(report: MergeReport) -> list[str]:
    """Return what to run instead of a merge whose base is quantized already.

    Parameters
    ----------
    report : MergeReport
        Its source, source format and adapters count.

    Returns
    -------
    list of str
        Command lines, in order.
    """
    base, lines = report.source, []
    if report.source_format != "gguf":
        lines.append(f"loraformat convert {quote(report.source)} base.gguf --dtype q8_0")
        base = "base.gguf"
    several, options = len(report.adapters) > 1, []
    for number, adapter in enumerate(report.adapters, 1):
        name = f"lora-{number}.gguf" if several else "lora.gguf"
        lines.append(
            f"loraformat convert {quote(adapter.path)} {name} --base {quote(report.source)}"
        )
        scaled = "" if adapter.weight == 1 else f":{adapter.weight:g}"
        options.append(f"--lora-scaled {name}{scaled}" if scaled else f"--lora {name}")
    return [*lines, f"llama-server -m {quote(base)} {' '.join(options)}"]
