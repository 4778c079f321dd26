"""``loraformat reduce``: rank reduction of an adapter."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy

from loraformat.algebra import lora
from loraformat.algebra.lora import Pair
from loraformat.algebra.ranks import allocate
from loraformat.errors import InputError, UsageError
from loraformat.model.adapter import Adapter, LoraDelta
from loraformat.model.report import Report
from loraformat.ops.adapter_output.output import ensure_not_exists, open_adapter_output
from loraformat.ops.arguments import Progress, reported
from loraformat.ops.deltas.factors import (
    SingleEntryCache,
    compute_factors,
    error_with_rounding,
    experts_of,
    factor_dtype,
    in_memory,
    lazy_delta,
    load_finite,
    with_deltas,
)
from loraformat.ops.opening.adapter import open_adapter
from loraformat.tensors.arrays import Array

__all__ = ["ReducedModule", "Reduction", "ReductionReport", "reduce", "reduce_adapter"]

#: Singular values below this share of the largest are float64's rounding, not the delta.
_ROUNDING = 1e-12


@dataclass(frozen=True, slots=True)
class Reduction:
    """How far to reduce; the options of `reduce`, checked together.

    Raises
    ------
    UsageError
        If nothing, or two things, are asked for.
    """

    rank: int | None = None
    energy: float | None = None
    budget: int | None = None
    max_rank: int | None = None
    statistics: bool = True
    dtype: str | None = None

    def __post_init__(self) -> None:
        chosen = [x for x in (self.rank, self.energy, self.budget) if x is not None]
        if len(chosen) > 1 or (not chosen and self.max_rank is None):
            raise UsageError("give one of --rank, --energy and --budget, or --max-rank alone")
        if self.rank is not None and self.max_rank is not None:
            raise UsageError("--rank is exact and --max-rank is a bound: give only one of them")
        if any(x is not None and x < 1 for x in (self.rank, self.budget, self.max_rank)):
            raise UsageError("rank, budget and max-rank are at least 1")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise UsageError(f"energy is a fraction above 0 and at most 1, not {self.energy}")


@dataclass(frozen=True, slots=True)
class ReducedModule:
    """Result for one module.

    Attributes
    ----------
    target : str
    old_rank, new_rank : int
        A new rank of 0: the delta is gone, it held nothing worth its place.
    energy : float
        Share of the squared norm that is kept; of the mean squared output if
        `activation_aware`.
    error : float
        √(1 − energy): the relative error of the delta, or of its output. `reduce` adds what
        rounding the new factors to their dtype costs, `reduce_adapter` does not know it.
    activation_aware : bool
    norm : float
        Of the delta, or the root mean square of its output.
    """

    target: str
    old_rank: int
    new_rank: int
    energy: float
    error: float
    activation_aware: bool
    norm: float


@dataclass(frozen=True, slots=True, repr=False)
class ReductionReport(Report):
    """Report of ``reduce``.

    Attributes
    ----------
    source, target : str
    modules : list of ReducedModule
    old_parameters, new_parameters : int
        Elements of A and B.
    energy : float or None
        Share of the whole adapter's squared norm that is kept; None if some modules are
        measured at their outputs and others are not.
    """

    source: str
    target: str
    modules: list[ReducedModule]
    old_parameters: int
    new_parameters: int
    energy: float | None


def reduce(
    adapter: str | Path,
    output: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    budget: int | None = None,
    max_rank: int | None = None,
    statistics: bool = True,
    dtype: str | None = None,
    base: str | Path | None = None,
    allow_base_mismatch: bool = False,
    allow_pickle: bool = False,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress = False,
) -> ReductionReport:
    """Reduce an adapter's rank with the smallest possible error.

    Each module's delta is replaced by its best low-rank approximation, computed from the factors
    in float64. If the adapter has activation statistics, the error of the module's output is
    minimised instead. The new factors are balanced and ordered by singular value, so any prefix of
    them is the best adapter of that rank. rsLoRA and per-module patterns are folded in.

    Parameters
    ----------
    adapter : str or Path
        In any format, or a Hub id.
    output : str or Path
        Output adapter: a PEFT directory, ``NAME.gguf`` for llama.cpp, or ``BUNDLE/adapters/NAME``.
    rank : int, optional
        Rank of every module.
    energy : float, optional
        Keep this fraction of each module's squared norm, for example 0.99.
    budget : int, optional
        Total number of parameters, distributed over the modules where they retain most.
    max_rank : int, optional
        Upper bound per module; alone, or with `energy` or `budget`.
    statistics : bool
        Use activation statistics, if the adapter has them, to minimise the error of the outputs;
        else that of the weights.
    dtype : str, optional
        Dtype of the new factors. [default: unchanged]
    base : str or Path, optional
        Base to compare names and shapes with; a GGUF adapter needs its ``config.json`` (a directory
        holding only that file is enough). Not needed for an adapter in a bundle.
    allow_base_mismatch : bool
        Accept an adapter that was made for another base.
    allow_pickle
        As in `convert`.
    force : bool
        Replace an existing `output`.
    dry_run : bool
        Report ranks and errors without writing anything.
    progress
        As in `convert`.

    Returns
    -------
    ReductionReport
    """
    reduction = Reduction(rank, energy, budget, max_rank, statistics, dtype)
    began = time.perf_counter()
    if not dry_run:
        ensure_not_exists(output, force=force)
    with ExitStack() as stack:
        told = stack.enter_context(reported(progress, "reduce"))
        out = open_adapter_output(
            stack, output, [adapter], base=base, dtype=dtype, force=force,
            dry_run=dry_run, allow_base_mismatch=allow_base_mismatch,
        )  # fmt: skip
        opened = stack.enter_context(
            open_adapter(adapter, base=out.checkpoint, allow_pickle=allow_pickle)
        )
        out.check(opened)
        rounding: dict[str, float] = {}
        smaller, report = reduce_adapter(opened, reduction, rounding=rounding, progress=told)
        notes = [*report.notes, *out.write(smaller)]
        compute_factors(smaller, rounding)
    modules = [_with_rounding(module, rounding) for module in report.modules]
    return replace(
        report,
        modules=modules,
        energy=None if report.energy is None else _total_energy(modules),
        source=str(adapter),
        target=str(output),
        notes=notes,
        seconds=time.perf_counter() - began,
        dry_run=dry_run,
    )


def reduce_adapter(
    adapter: Adapter,
    reduction: Reduction,
    *,
    rounding: dict[str, float] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Adapter, ReductionReport]:
    """Return the reduced adapter, lazily, and its report.

    Only singular values are computed here; factors when they are loaded, so the given
    adapter must stay open until then.

    Parameters
    ----------
    adapter : Adapter
    reduction : Reduction
    rounding : dict of str to float, optional
        Takes, by target, the relative error that rounding the new factors makes, once they are
        loaded.
    progress : callable
        Called with bytes done and in total.

    Returns
    -------
    Adapter
        Scaling folded: alpha is the rank, of every module its own.
    ReductionReport

    Raises
    ------
    InputError
        If a factor is not finite, or nothing would be left.
    """
    aware = _aware(adapter, reduction)
    values = _all_values(adapter, aware, progress)
    ranks = _choose(adapter, values, reduction)
    memo, deltas, modules = SingleEntryCache(), {}, []
    rounding = {} if rounding is None else rounding
    for target, delta in adapter.deltas.items():
        rank = ranks[target]
        modules.append(_module(delta, values[target], rank, target in aware))
        if rank:
            deltas[target] = _reduced(delta, rank, target in aware, reduction.dtype, memo, rounding)
    if not deltas and adapter.deltas:
        raise InputError(
            "nothing remains: every delta is zero, or the budget is smaller than a single rank",
            path=adapter.path,
            hint="give a larger budget, or use --rank, which keeps zero deltas",
        )
    notes = _notes(adapter, reduction, modules, aware)
    smaller = replace(with_deltas(adapter, deltas), notes=(*adapter.notes, *notes))
    return smaller, ReductionReport(
        source=str(adapter.path),
        target="",
        modules=modules,
        old_parameters=sum(delta.parameters for delta in adapter.deltas.values()),
        new_parameters=sum(delta.parameters for delta in deltas.values()),
        energy=_total_energy(modules),
        notes=[*adapter.notes, *notes],
    )


def _aware(adapter: Adapter, reduction: Reduction) -> set[str]:
    """Return the targets with activation statistics, reduced by output error."""
    if not reduction.statistics:
        return set()
    aware = {target for target, delta in adapter.deltas.items() if _moment_fits(delta)}
    # A budget compares modules, and outputs cannot be compared with weights.
    all_or_none = reduction.budget is not None and len(aware) < len(adapter.deltas)
    return set() if all_or_none else aware


def _moment_fits(delta: LoraDelta) -> bool:
    wanted = (*delta.a.shape[:-1], delta.rank)
    return delta.second_moment is not None and delta.second_moment.shape == wanted


def _all_values(
    adapter: Adapter, aware: set[str], progress: Callable[[int, int], None]
) -> dict[str, Array]:
    total = sum(delta.a.nbytes + delta.b.nbytes for delta in adapter.deltas.values())
    done, values = 0, {}
    for target, delta in adapter.deltas.items():
        moment = _moment(delta, target in aware)
        found = lora.singular_values(
            load_finite(delta.b), load_finite(delta.a), delta.scaling, moment
        )
        values[target] = lora.pooled(found)
        done += delta.a.nbytes + delta.b.nbytes
        progress(done, total)
    return values


def _moment(delta: LoraDelta, aware: bool) -> Array | None:
    return load_finite(delta.second_moment) if aware and delta.second_moment is not None else None


def _choose(adapter: Adapter, values: dict[str, Array], reduction: Reduction) -> dict[str, int]:
    if reduction.rank is not None:
        return {target: min(reduction.rank, len(s)) for target, s in values.items()}
    if reduction.budget is not None:
        costs = [_cost(delta) for delta in adapter.deltas.values()]
        rounded = [numpy.where(s > _ROUNDING * s[:1], s, 0) for s in values.values()]
        bought = allocate(rounded, costs, reduction.budget, reduction.max_rank)
        ranks = dict(zip(values, bought, strict=True))
    else:
        energy = reduction.energy if reduction.energy is not None else 1.0
        ranks = {target: _by_energy(s, energy) for target, s in values.items()}
    if reduction.max_rank is not None:
        ranks = {target: min(rank, reduction.max_rank) for target, rank in ranks.items()}
    return {target: max(rank, _least(adapter.deltas[target])) for target, rank in ranks.items()}


def _cost(delta: LoraDelta) -> int:
    return experts_of(delta) * (delta.in_features + delta.out_features)


def _by_energy(s: Array, energy: float) -> int:
    held = int((s > _ROUNDING * s[:1]).sum())
    return min(lora.energy_rank(s, energy), held)


def _least(delta: LoraDelta) -> int:
    """Return the least rank: 1 for a module with a trained magnitude or bias, else 0."""
    return int(delta.magnitude is not None or delta.bias is not None)


def _module(delta: LoraDelta, s: Array, rank: int, aware: bool) -> ReducedModule:
    total, lost = float((s**2).sum()), float((s[rank:] ** 2).sum())
    lost_share = lost / total if total else 0.0
    error, norm = lost_share**0.5, total**0.5
    return ReducedModule(delta.target, delta.rank, rank, 1 - lost_share, error, aware, norm)


def _with_rounding(module: ReducedModule, rounding: dict[str, float]) -> ReducedModule:
    if module.target not in rounding:
        return module
    error = error_with_rounding(module.error, rounding[module.target])
    return replace(module, energy=1 - error**2, error=error)


def _total_energy(modules: list[ReducedModule]) -> float | None:
    if len({module.activation_aware for module in modules}) > 1:
        return None
    total = sum(module.norm**2 for module in modules)
    kept = sum(module.norm**2 * module.energy for module in modules)
    return kept / total if total else 1.0


def _reduced(
    delta: LoraDelta,
    rank: int,
    aware: bool,
    dtype: str | None,
    memo: SingleEntryCache,
    rounding: dict[str, float],
) -> LoraDelta:
    stored = factor_dtype(delta, dtype)

    def decompose() -> lora.Core:
        moment = _moment(delta, aware)
        return lora.core(load_finite(delta.b), load_finite(delta.a), delta.scaling, moment)

    def compute() -> Pair:
        # Rounded once, where its error is measured.
        return lora.truncate(decompose(), rank, numpy.float64)

    smaller = lazy_delta(delta, rank, stored, compute, memo, rounding)
    bias, moment = delta.bias, None
    if bias is not None:  # scaling · bias was added: fold it too
        folded = load_finite(bias).astype(numpy.float64) * delta.scaling
        bias = in_memory(bias.name, folded, stored)
    if delta.second_moment is not None and _moment_fits(delta):
        name = delta.second_moment.name
        before = load_finite(delta.second_moment)
        moment = in_memory(name, lora.truncated_second_moment(decompose(), before, rank))
    return replace(smaller, bias=bias, second_moment=moment)


def _notes(
    adapter: Adapter, reduction: Reduction, modules: list[ReducedModule], aware: set[str]
) -> list[str]:
    deltas = adapter.deltas.values()
    notes = []
    if magnitudes := sum(delta.magnitude is not None for delta in deltas):
        notes.append(
            f"{magnitudes} modules have DoRA magnitudes: they are kept, because they do not "
            "depend on the rank; energies and errors refer to B A only"
        )
    statistics = sum(delta.second_moment is not None for delta in deltas)
    if statistics > len(aware) and reduction.statistics:
        notes.append(
            f"{statistics} of {len(modules)} modules carry activation statistics, and "
            f"{len(aware)} could use them: a budget needs one measure for all modules, and the "
            "statistics must match the rank"
        )
    if reduction.rank is not None and (
        short := sum(module.new_rank < reduction.rank for module in modules)
    ):
        notes.append(f"{short} modules have a rank below {reduction.rank} and are unchanged")
    if gone := sum(module.new_rank == 0 for module in modules):
        notes.append(f"{gone} modules were omitted: no rank of theirs contributes enough")
    return notes
