"""Singular values, effective ranks and suggested ranks of an adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy

from loraformat.algebra import lora
from loraformat.algebra.ranks import entropy_rank, stable_rank
from loraformat.families.tensor_names import layer_of
from loraformat.model.adapter import Adapter, LoraDelta
from loraformat.model.architecture import kind_of
from loraformat.model.report import Report
from loraformat.ops.arguments import Progress, reported
from loraformat.ops.deltas.factors import experts_of, load_finite
from loraformat.ops.opening.adapter import open_adapter
from loraformat.tensors.arrays import Array

__all__ = [
    "ENERGIES",
    "ModuleSpectrum",
    "SpectrumReport",
    "pooled",
    "spectrum",
    "spectrum_of",
]

#: Shares of the squared norm for which ranks are suggested.
ENERGIES = (0.90, 0.95, 0.99)


@dataclass(frozen=True, slots=True)
class ModuleSpectrum:
    """The spectrum of one module's delta.

    Attributes
    ----------
    target, kind : str
    layer : int or None
    rank : int
    out_features, in_features, experts : int
    singular_values : list of float
        Descending, scaling included. Of experts: √Σ over them, part by part.
    norm : float
        ‖D‖ in the Frobenius norm.
    stable_rank, entropy_rank : float
        See `loraformat.algebra.ranks`.
    energies : list of float
        Share of ‖D‖² in the first 1, 2, ... parts.
    suggested : dict of str to int
        Least rank for 90, 95 and 99 % of ‖D‖².
    output_suggested : dict of str to int or None
        The same for the mean squared output, if the adapter carries activation statistics.
    """

    target: str
    kind: str
    layer: int | None
    rank: int
    out_features: int
    in_features: int
    experts: int
    singular_values: list[float]
    norm: float
    stable_rank: float
    entropy_rank: float
    energies: list[float]
    suggested: dict[str, int]
    output_suggested: dict[str, int] | None = None


@dataclass(frozen=True, slots=True, repr=False)
class SpectrumReport(Report):
    """The spectra of an adapter.

    Attributes
    ----------
    source : str
    modules : list of ModuleSpectrum
    parameters : int
    suggested : dict of str to int
        Least rank that, given to every module, keeps 90, 95 and 99 % of Σ‖D‖².
    suggested_parameters : dict of str to int
        Parameters if every module has its own suggested rank.
    """

    _shared: ClassVar[tuple[str, ...]] = ("notes",)

    source: str
    modules: list[ModuleSpectrum]
    parameters: int
    suggested: dict[str, int]
    suggested_parameters: dict[str, int]


def spectrum(
    adapter: str | Path, *, allow_pickle: bool = False, progress: Progress = False
) -> SpectrumReport:
    """Show the singular value spectrum and effective ranks of an adapter.

    Per module: the norm of the delta, its effective rank (stable rank and entropy rank), and the
    smallest ranks that keep 90, 95 and 99 % of its squared norm.

    Parameters
    ----------
    adapter : str or Path
        In any format, or a Hub id.
    allow_pickle, progress
        As in `convert`.

    Returns
    -------
    SpectrumReport
    """
    with (
        reported(progress, "spectrum") as told,
        open_adapter(adapter, allow_pickle=allow_pickle) as opened,
    ):
        return spectrum_of(opened, progress=told)


def spectrum_of(
    adapter: Adapter, *, progress: Callable[[int, int], None] = lambda done, total: None
) -> SpectrumReport:
    """Decompose an open adapter."""
    total = sum(delta.a.nbytes + delta.b.nbytes for delta in adapter.deltas.values())
    done, modules = 0, []
    for delta in adapter.deltas.values():
        modules.append(_module(delta))
        done += delta.a.nbytes + delta.b.nbytes
        progress(done, total)
    notes = list(adapter.notes)
    if any(delta.magnitude is not None for delta in adapter.deltas.values()):
        notes.append("DoRA: the spectra are those of B A, without magnitudes")
    return SpectrumReport(
        source=str(adapter.path),
        modules=modules,
        parameters=sum(delta.parameters for delta in adapter.deltas.values()),
        suggested=_suggest(pooled(module.singular_values for module in modules)),
        suggested_parameters={
            word: sum(module.suggested[word] * _cost(module) for module in modules)
            for word in map(_percent, ENERGIES)
        },
        notes=notes,
    )


def _module(delta: LoraDelta) -> ModuleSpectrum:
    b, a = load_finite(delta.b), load_finite(delta.a)
    values = lora.pooled(lora.singular_values(b, a, delta.scaling))
    squares = values**2
    total = float(squares.sum())
    output, layer = None, layer_of(delta.target)
    if delta.second_moment is not None:
        moment = load_finite(delta.second_moment)
        output = _suggest(lora.pooled(lora.singular_values(b, a, delta.scaling, moment)))
    return ModuleSpectrum(
        target=delta.target,
        kind=kind_of(delta.target),
        layer=None if layer is None else layer[1],
        rank=delta.rank,
        out_features=delta.out_features,
        in_features=delta.in_features,
        experts=experts_of(delta),
        singular_values=values.tolist(),
        norm=total**0.5,
        stable_rank=stable_rank(values),
        entropy_rank=entropy_rank(values),
        energies=(numpy.cumsum(squares) / total).tolist() if total else [1.0] * len(values),
        suggested=_suggest(values),
        output_suggested=output,
    )


def pooled(spectra: Iterable[list[float]]) -> Array:
    """Return the contribution of rank k in every module: √Σ σₖ² over the modules."""
    held = list(spectra)
    sums = numpy.zeros(max(map(len, held), default=0))
    for values in held:
        sums[: len(values)] += numpy.square(values)
    return numpy.sqrt(sums)


def _percent(energy: float) -> str:
    return f"{energy:.0%}"


def _suggest(values: Array) -> dict[str, int]:
    return {_percent(energy): lora.energy_rank(values, energy) for energy in ENERGIES}


def _cost(module: ModuleSpectrum) -> int:
    return module.experts * (module.out_features + module.in_features)
