"""Approximate unmerge by subtraction, with an error estimate.

The merge rounded W + D to M, off by half a step of the dtype at most; the subtraction rounds
M − D to R, off by half a step at R. So every weight is within (step(M) + step(R)) / 2 of the
original, if that had the dtype of M, was merged as loraformat merges, in float32 and with one
rounding, and with these adapters and weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from typing import Any

import numpy

from loraformat.errors import UnsupportedError, UsageError
from loraformat.model.adapter import Adapter
from loraformat.model.checkpoint import DenseTensor
from loraformat.model.report import Report
from loraformat.ops.merge.merge import merge
from loraformat.ops.merge.tokenizers import still_prompted_by
from loraformat.ops.opening.adapter import open_adapter
from loraformat.ops.opening.model import open_model
from loraformat.tensors.arrays import Array

__all__ = ["Deviation", "UnmergeReport", "subtract"]

#: Bits of the significand, and the exponent e of the smallest normal number in [2^(e-1), 2^e).
_PRECISION = {"BF16": (8, -125), "F16": (11, -13), "F32": (24, -125)}
#: Steps of float32, in which the sums are formed before they are rounded to 16 bits.
_SLACK = {"BF16": 1 + 2**-15, "F16": 1 + 2**-12, "F32": 1.0}
_TILE = 1 << 20


@dataclass(frozen=True, slots=True)
class Deviation:
    """Error bound of a tensor after subtraction.

    Attributes
    ----------
    name : str
    largest : float
        No weight is off by more.
    relative : float
        ‖result − original‖ / ‖result‖ is not more.
    steps : float
        `largest`, in steps of the dtype at that weight: one from the merge at least, and much
        more where a large delta has been taken from a small weight.
    saturated : int
        float16 weights at the end of the range, of which nothing is known and which are not
        counted above.
    """

    name: str
    largest: float
    relative: float
    steps: float
    saturated: int = 0


@dataclass(frozen=True, slots=True, repr=False)
class UnmergeReport(Report):
    """Report of ``unmerge``.

    Attributes
    ----------
    source, target : str
    exact : bool
        Every byte is the original's, proven by hash.
    tensors, restored : int
        All tensors of the output, and those that the merge had changed.
    error_bound : float
        Of an approximate one: ‖result − original‖ / ‖result‖ over all changed tensors is not
        more; else 0.
    modules : list of Deviation
        The same for each tensor.
    output_bytes : int
    """

    source: str
    target: str
    exact: bool
    tensors: int
    restored: int
    error_bound: float = 0.0
    modules: list[Deviation] = field(default_factory=list)
    output_bytes: int = 0


def subtract(
    merged: str | Path,
    target: str | Path,
    adapters: Sequence[str | Path | Adapter],
    weights: Sequence[float],
    *,
    dry_run: bool = False,
    allow_pickle: bool = False,
    **options: Any,
) -> UnmergeReport:
    """Merge with the negative of the merge's weights and bound the error.

    Other parameters are those of `loraformat.ops.merge.merge.merge`.

    Raises
    ------
    UnsupportedError
        If an adapter did more than add: DoRA, replaced tensors and rows.
    """
    if not adapters:
        raise UsageError("give --undo with the merge's undo record, or --adapter to subtract")
    with ExitStack() as stack:
        checkpoint = stack.enter_context(open_model(merged))
        opened = [
            stack.enter_context(open_adapter(one, base=checkpoint, allow_pickle=allow_pickle))
            for one in adapters
        ]
        for adapter in opened:
            _refuse_what_cannot_be_subtracted(adapter)
        prompted = still_prompted_by(checkpoint.files, opened)
    report = merge(
        merged, list(adapters), target,
        weight=[-weight for weight in weights or [1.0] * len(adapters)],
        allow_base_mismatch=True, allow_pickle=allow_pickle, dry_run=dry_run, **options,
    )  # fmt: skip
    bounds = [] if dry_run else list(_bounds(merged, target, [m.name for m in report.modules]))
    bound = _total(bounds)
    return UnmergeReport(
        source=report.source,
        target=report.target,
        exact=False,
        tensors=report.tensors,
        restored=report.merged,
        error_bound=bound,
        modules=[found.deviation() for found in bounds],
        output_bytes=report.output_bytes,
        notes=[_note(bounds, bound), *report.warnings, *prompted],
        seconds=report.seconds,
        dry_run=report.dry_run,
    )


def _refuse_what_cannot_be_subtracted(adapter: Adapter) -> None:
    kinds = {
        "DoRA, whose norms need the original weights": any(
            d.magnitude for d in adapter.deltas.values()
        ),
        "replaced tensors": bool(adapter.replacements),
        "replaced rows": bool(adapter.rows),
    }
    if found := [kind for kind, present in kinds.items() if present]:
        raise UnsupportedError(
            f"has {' and '.join(found)}: the original cannot be restored by subtraction",
            path=adapter.path,
            hint="use --undo with the merge's undo record",
        )


@dataclass(slots=True)
class _Bound:
    """Sums over one tensor."""

    name: str
    largest: float = 0.0
    steps: float = 0.0
    squares: float = 0.0
    norm: float = 0.0
    saturated: int = 0

    def add(self, before: Array, after: Array, dtypes: tuple[str, str]) -> None:
        """Add weights before and after the subtraction."""
        first, last = (_steps(v, t) for v, t in zip((before, after), dtypes, strict=True))
        known = numpy.isfinite(first + last)
        if dtypes[0] == "F16":
            known &= numpy.abs(before) < 65504
        self.saturated += known.size - numpy.count_nonzero(known)
        off = (0.5 * first * _SLACK[dtypes[0]] + 0.5 * last * _SLACK[dtypes[1]])[known]
        self.largest = max(self.largest, float(off.max(initial=0.0)))
        self.steps = max(self.steps, float((off / last[known]).max(initial=0.0)))
        self.squares += float(off @ off)
        result = after[known].astype(numpy.float64)
        self.norm += float(result @ result)

    def deviation(self) -> Deviation:
        """Return the error bound."""
        return Deviation(
            self.name, self.largest, _ratio(self.squares, self.norm), self.steps, self.saturated
        )


def _steps(values: Array, dtype: str) -> Array:
    """Return the distance of each value to the next one of its dtype, away from zero."""
    bits, least = _PRECISION[dtype]
    wide = values.astype(numpy.float64)
    exponent = numpy.maximum(numpy.frexp(wide)[1], least) - bits
    return numpy.where(numpy.isfinite(wide), numpy.ldexp(1.0, exponent), numpy.inf)


def _ratio(part: float, whole: float) -> float:
    return float(f"{sqrt(part / whole):.4g}") if whole else 0.0


def _total(bounds: Sequence[_Bound]) -> float:
    return _ratio(sum(b.squares for b in bounds), sum(b.norm for b in bounds))


def _bounds(merged: str | Path, target: str | Path, names: Sequence[str]) -> Iterator[_Bound]:
    """Compare each changed tensor before and after."""
    with open_model(merged) as base, open_model(target) as result:
        before, after = base.tensors, result.tensors
        for name in names:
            pair = (before.get(name), after.get(name))
            first, last = pair
            if not isinstance(first, DenseTensor) or not isinstance(last, DenseTensor):
                continue
            found, dtypes = _Bound(name), (first.dtype, last.dtype)
            one, other = first.array().reshape(-1), last.array().reshape(-1)
            for start in range(0, len(one), _TILE):
                found.add(one[start : start + _TILE], other[start : start + _TILE], dtypes)
            first.release()
            last.release()
            yield found


def _note(bounds: Sequence[_Bound], bound: float) -> str:
    text = "this is not exactly the original: merge and subtraction both rounded"
    if bounds:
        worst = max(bounds, key=lambda found: found.largest)
        text += (
            f", and the changed weights are off by up to {bound:.2g} of their norm, one of "
            f"{worst.name} by up to {worst.largest:.2g}, if this is what was merged"
        )
    if saturated := sum(found.saturated for found in bounds):
        text += f"; {saturated} weights at the limit of float16's range may have any error"
    return text + "; only an undo record (merge --undo) restores it exactly"
