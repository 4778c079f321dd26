"""Combination of several adapters by their effective deltas.

What is combined is Dᵢ = sᵢ·Bᵢ Aᵢ with each module's own resolved scaling, never A and B by
themselves: factors of different adapters live in different bases. (B₁ + B₂)(A₁ + A₂) has the
cross terms B₁A₂ + B₂A₁, which no adapter was trained for; and an element of B that is small,
or has another sign, says nothing of the elements of D.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy

from loraformat.algebra import lora
from loraformat.errors import InputError
from loraformat.model.adapter import Adapter, LoraDelta
from loraformat.model.checkpoint import DenseTensor
from loraformat.model.report import Report
from loraformat.ops.adapter_output.output import ensure_not_exists, open_adapter_output
from loraformat.ops.arguments import Progress, many, reported
from loraformat.ops.combine.elementwise import interfered
from loraformat.ops.combine.options import EXACT, METHODS, CombineOptions, Method
from loraformat.ops.combine.replacements import combined_replacements, combined_rows
from loraformat.ops.combine.tokenizers import other_tokenizers
from loraformat.ops.combine.weighted_deltas import (
    WeightedDelta,
    refuse_dora,
    terms_of,
    weighted_sum,
)
from loraformat.ops.deltas.factors import (
    SingleEntryCache,
    compute_factors,
    error_with_rounding,
    factor_dtype,
    in_memory,
    lazy_delta,
    load_finite,
    with_deltas,
)
from loraformat.ops.deltas.spool import Spool
from loraformat.ops.opening.adapter import open_adapter
from loraformat.ops.opening.adapter_weights import adapter_weights
from loraformat.tensors.arrays import numpy_dtype

__all__ = [
    "METHODS", "CombinationReport", "CombineOptions", "CombinedModule", "combine",
    "combine_adapters",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class CombinedModule:
    """Result for one module.

    Attributes
    ----------
    target : str
    ranks : list of int
        Of the adapters that change it.
    rank : int
        Of the result.
    energy : float
        Share of the combined delta's squared norm that this rank holds.
    error : float
        √(1 − energy). `combine` adds what rounding the new factors to their dtype costs.
    """

    target: str
    ranks: list[int]
    rank: int
    energy: float
    error: float

    def with_rounding(self, rounding: float) -> CombinedModule:
        """Return the module with the error of its factors' rounding added."""
        error = error_with_rounding(self.error, rounding)
        return replace(self, energy=1 - error**2, error=error)


@dataclass(frozen=True, slots=True, repr=False)
class CombinationReport(Report):
    """The report of ``combine``.

    Attributes
    ----------
    sources : list of str
    target : str
    method : str
    weights : list of float
    modules : list of CombinedModule
    parameters : int
    """

    sources: list[str]
    target: str
    method: str
    weights: list[float]
    modules: list[CombinedModule]
    parameters: int


def combine(
    adapters: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    method: Method = "svd",
    weight: float | Sequence[float] = (),
    rank: int | None = None,
    density: float = 0.5,
    seed: int = 0,
    dtype: str | None = None,
    base: str | Path | None = None,
    allow_base_mismatch: bool = False,
    allow_pickle: bool = False,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress = False,
) -> CombinationReport:
    """Combine several adapters into one.

    The effective deltas are combined (including rsLoRA and per-module patterns), not the factors A
    and B separately. Ranks and target modules may differ.

    Parameters
    ----------
    adapters : str, Path or a sequence of them
        In any format, or Hub ids.
    output : str or Path
        Output adapter: a PEFT directory, ``NAME.gguf`` for llama.cpp, or ``BUNDLE/adapters/NAME``.
    method : str
        svd: best rank-R approximation of the weighted sum. cat: exact sum, ranks added. linear:
        exact sum at the smallest sufficient rank. The others prune or drop elements first.
    weight : float or sequence of float
        Weight of each adapter, in the same order; may be negative. [default: 1 each]
    rank : int, optional
        Rank of the result. [default: the largest input rank, per module]
    density : float
        Fraction of elements kept by pruning or dropping.
    seed : int
        Random seed for dropping.
    dtype, base, allow_base_mismatch, allow_pickle, force, dry_run
        As in `reduce`.
    progress : bool or callable
        True shows a bar on stderr; a callable gets the modules done and in total.

    Returns
    -------
    CombinationReport
    """
    options, sources = CombineOptions(method, rank, density, seed, dtype), many(adapters)
    began = time.perf_counter()
    if not dry_run:
        ensure_not_exists(output, force=force)
    with ExitStack() as stack:
        told = stack.enter_context(reported(progress, "combine", "module"))
        out = open_adapter_output(
            stack, output, sources, base=base, dtype=dtype, force=force, dry_run=dry_run,
            allow_base_mismatch=allow_base_mismatch,
        )  # fmt: skip
        opened: list[Adapter] = []
        for source in sources:
            one = open_adapter(source, base=out.checkpoint, allow_pickle=allow_pickle)
            opened.append(stack.enter_context(one))
            out.check(opened[-1])
        rounding: dict[str, float] = {}
        result, report = combine_adapters(
            opened, options, weights=many(weight), rounding=rounding, progress=told
        )
        with result:
            notes = [*report.notes, *out.write(result)]
            compute_factors(result, rounding)
    return replace(
        report,
        modules=[module.with_rounding(rounding.get(module.target, 0)) for module in report.modules],
        sources=[str(source) for source in sources],
        target=str(output),
        notes=notes,
        seconds=time.perf_counter() - began,
        dry_run=dry_run,
    )


def combine_adapters(
    adapters: Sequence[Adapter],
    options: CombineOptions | None = None,
    *,
    weights: Sequence[float] | None = None,
    rounding: dict[str, float] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Adapter, CombinationReport]:
    """Return the combined adapter and its per-module report.

    Parameters
    ----------
    adapters : sequence of Adapter
        They must stay open until the result is written.
    options : CombineOptions, optional
    weights : sequence of float, optional
    rounding : dict of str to float, optional
        Takes, by target, the relative error that rounding the new factors makes, once they are
        loaded.
    progress : callable

    Returns
    -------
    Adapter
        To be closed; factors that took long to find are in a temporary file.
    CombinationReport

    Raises
    ------
    UsageError
        If the weights do not fit the adapters.
    UnsupportedError
        For what has no weighted sum: DoRA, whole tensors that differ.
    InputError
        If adapters disagree on a module's dimensions.
    """
    options = options or CombineOptions()
    weights = adapter_weights(weights, len(adapters))
    refuse_dora(adapters)
    targets = list(dict.fromkeys(target for adapter in adapters for target in adapter.deltas))
    exact = options.method in EXACT
    replacements, whole = combined_replacements(adapters, weights, exact=exact)
    rows, more = combined_rows(adapters, weights, exact=exact)
    work = _Combination(options, {} if rounding is None else rounding)
    try:
        for number, target in enumerate(targets, 1):
            work.add(terms_of(adapters, weights, target))
            progress(number, len(targets))
        if targets and not work.deltas:
            raise InputError("the weighted sum of the adapters is zero in every module")
    except BaseException:
        work.spool.close()
        raise
    notes = [*_notes(adapters, work), *whole, *more]
    result = replace(
        with_deltas(adapters[0], work.deltas, adapters[1:]),
        replacements=replacements,
        rows=rows,
        sources=tuple(path for adapter in adapters for path in adapter.sources),
        notes=tuple(notes),
        base_fingerprint=_common([adapter.base_fingerprint for adapter in adapters]),
        close=work.spool.close,
    )
    return result, CombinationReport(
        sources=[str(adapter.path) for adapter in adapters],
        target="",
        method=options.method,
        weights=list(weights),
        modules=work.modules,
        parameters=sum(delta.parameters for delta in work.deltas.values()),
        notes=notes,
    )


class _Combination:
    """Builder of a combination, module by module."""

    def __init__(self, options: CombineOptions, rounding: dict[str, float]) -> None:
        self.options, self.rounding = options, rounding
        self.spool = Spool()
        self.deltas: dict[str, LoraDelta] = {}
        self.modules: list[CombinedModule] = []
        self._memo = SingleEntryCache()

    def add(self, terms: list[WeightedDelta]) -> None:
        """Combine one target."""
        first = terms[0].delta
        dtypes = {factor_dtype(term.delta, self.options.dtype) for term in terms}
        stored = dtypes.pop() if len(dtypes) == 1 else "F32"
        if self.options.method in EXACT:
            rank, energy, compute = weighted_sum(terms, self.options)
            combined = lazy_delta(first, rank, stored, compute, self._memo, self.rounding)
        else:
            energy, (b, a) = interfered(terms, self.options)
            rank = a.shape[-2]
            self.rounding[first.target] = lora.rounding_error(b, a, numpy_dtype(stored))
            combined = replace(
                first,
                a=self.spool.put(first.a.name, a, stored),
                b=self.spool.put(first.b.name, b, stored),
                scaling=1.0,
                alpha=float(rank),
            )
        ranks = [term.delta.rank for term in terms]
        error = max(1 - energy, 0.0) ** 0.5
        self.modules.append(CombinedModule(first.target, ranks, rank, energy, error))
        if rank:
            bias = _bias(terms, stored)
            self.deltas[first.target] = replace(combined, bias=bias, second_moment=None)


def _bias(terms: Sequence[WeightedDelta], dtype: str) -> DenseTensor | None:
    parts = [(term.weight, term.delta.bias) for term in terms if term.delta.bias is not None]
    if not parts:
        return None
    total = sum(weight * load_finite(bias).astype(numpy.float64) for weight, bias in parts)
    return in_memory(parts[0][1].name, numpy.asarray(total), dtype)


def _common(values: Sequence[str | None]) -> str | None:
    return values[0] if len(set(values)) == 1 else None


def _notes(adapters: Sequence[Adapter], work: _Combination) -> list[str]:
    notes = []
    names = sorted({adapter.base_model for adapter in adapters if adapter.base_model})
    if len(names) > 1:
        notes.append(f"the adapters name different bases: {', '.join(names)}")
    if len({a.base_fingerprint for a in adapters if a.base_fingerprint}) > 1:
        notes.append("the adapters were made for bases with different fingerprints")
    if any(d.second_moment for adapter in adapters for d in adapter.deltas.values()):
        notes.append(
            "activation statistics are not carried over: they do not describe the combined adapter"
        )
    notes += other_tokenizers(adapters)
    if gone := len(work.modules) - len(work.deltas):
        notes.append(f"{gone} modules cancel to zero and are left out")
    return notes
