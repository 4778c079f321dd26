"""The report of ``merge``, and advice if too little of a delta is left.

With the exact change D = g·(w + d) − w and the effective one E = merged − w, of each tensor
and in total:

    relative   ‖D‖ / ‖W‖
    gain       ⟨E, D⟩ / ‖D‖²          1 if nothing is lost on average
    error      ‖E − D‖ / ‖D‖          what rounding adds or takes
    swallowed  share of the changed weights that come out as if there were no adapter; where a
               writer rounds to types of its own, counted on a part of them
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt
from shlex import quote
from typing import ClassVar

import numpy

from loraformat.model.checkpoint import LazyTensor
from loraformat.model.quantization_history import Quantized
from loraformat.model.report import Report
from loraformat.nf4.kernels.merge_tile import TileSums
from loraformat.tensors.arrays import Array

__all__ = [
    "Change", "MergeReport", "MergedAdapter", "Meter", "UndoSummary", "advice", "commands",
]  # fmt: skip

#: Above these, half of what training did may be gone: then there is a warning.
_MUCH_ERROR = 0.3
_MUCH_SWALLOWED = 0.2
#: The same for types that round numbers together: their errors are those of the whole weights, and
#: a delta that is lost in each of them may be there on average.
_LITTLE_KEPT = 0.8
#: How many times as large as the delta is what quantizing a quantized base again adds.
_DROWNING = 3.0
#: Numbers whose products are summed in float32.
_SUMMED = 1 << 16


@dataclass(frozen=True, slots=True)
class Change:
    """Retention of the delta of one tensor, or of all.

    Attributes
    ----------
    name : str
    relative, gain, error, swallowed : float
        See above.
    clipped : int
        Values beyond the range of the output's dtype.
    """

    name: str
    relative: float
    gain: float
    error: float
    swallowed: float
    clipped: int


@dataclass(frozen=True, slots=True)
class MergedAdapter:
    """One merged adapter: path, format, weight and notes."""

    path: str
    format: str
    weight: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class UndoSummary:
    """The undo record: path, size in bytes and in bits per merged parameter."""

    path: str
    bytes: int
    bits_per_weight: float


@dataclass(frozen=True, slots=True, repr=False)
class MergeReport(Report):
    """Report of ``merge``.

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


@dataclass(slots=True)
class Meter:
    """Collects sums over elements by tensor; a `loraformat.plugins.RoundingObserver`.

    ``sources`` are what tensors were before the merge, where a writer rounds to types of its own
    and tells what it stores of them.
    """

    sources: Mapping[str, LazyTensor] = field(default_factory=dict)
    sums: dict[str, TileSums] = field(default_factory=dict)

    def before(self, name: str) -> LazyTensor | None:
        """Return a tensor as it was before the merge; None if it is not measured."""
        return self.sources.get(name)

    def compare(
        self, before: Array, wanted: Array, stored: Array, untouched: Array | None
    ) -> TileSums:
        """Measure a piece of a tensor: original, exact merge, and result, in float32.

        ``untouched`` is what it would have become without a change; None where that is not counted.
        """
        delta, effect = wanted - before, stored - before
        changed = swallowed = 0
        if untouched is not None:
            other = delta != 0
            changed, swallowed = int(other.sum()), int((other & (stored == untouched)).sum())
        product = _dot(effect, delta)
        effect -= delta
        weight, change, error = (_dot(values, values) for values in (before, delta, effect))
        return TileSums(weight, change, product, error, changed, swallowed, clipped=0)

    def add(self, name: str, measured: TileSums) -> None:
        """Add the sums of `compare` or `loraformat.nf4.kernels.merge_tile.merge_tile`."""
        self.sums[name] = _total((self.sums.get(name), measured))

    def changes(self) -> list[Change]:
        """Return the figures of every tensor, sorted by name."""
        return [_change(name, self.sums[name]) for name in sorted(self.sums)]

    def total(self) -> Change:
        """Return the figures of all tensors together."""
        return _change("total", _total(self.sums.values()))


def _total(sums: Iterable[TileSums | None]) -> TileSums:
    return TileSums(*map(sum, zip(*filter(None, sums), strict=True)))


def _change(name: str, sums: TileSums) -> Change:
    return Change(
        name,
        relative=_digits(sqrt(sums.delta / sums.weight) if sums.weight else 0.0),
        gain=_digits(sums.product / sums.delta if sums.delta else 1.0),
        error=_digits(sqrt(sums.error / sums.delta) if sums.delta else 0.0),
        swallowed=_digits(sums.swallowed / sums.changed if sums.changed else 0.0),
        clipped=sums.clipped,
    )


def _digits(value: float) -> float:
    """Round to four digits, which all machines agree on."""
    return float(f"{value:.4g}")


def _dot(one: Array, other: Array) -> float:
    """Return the sum of products in float32 chunks, correct to six digits."""
    flat = one.reshape(-1), other.reshape(-1)
    return sum(
        float(numpy.dot(*(vector[start : start + _SUMMED] for vector in flat)))
        for start in range(0, one.size, _SUMMED)
    )


def advice(
    total: Change, dtypes: Sequence[str], *, requantized: bool, beside: Sequence[str] = ()
) -> list[str]:
    """Return warnings with their remedies.

    ``dtypes`` are what the merged tensors are stored as: safetensors names, or a format's own.
    ``beside`` are commands that leave a base that was quantized already as it is.

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
    """Return the commands, in order, to run instead if the base is already quantized."""
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
