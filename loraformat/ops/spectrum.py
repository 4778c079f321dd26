"""Spectra: what ranks an adapter uses, and what ranks would do."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from loraformat import lora
from loraformat.adapter import Adapter, LoraDelta
from loraformat.architecture import kind_of
from loraformat.errors import MissingDependencyError, UsageError, printable
from loraformat.layout import layer_of
from loraformat.ops.factors import experts_of, finite
from loraformat.ranks import entropy_rank, stable_rank

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "ENERGIES",
    "ModuleSpectrum",
    "SpectrumReport",
    "check_plot",
    "plot",
    "spectrum",
    "spectrum_of",
]

#: Shares of the squared norm for which ranks are suggested.
ENERGIES = (0.90, 0.95, 0.99)

_PICTURES = (".png", ".svg", ".pdf")


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
        See `loraformat.ranks`.
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


@dataclass(frozen=True, slots=True)
class SpectrumReport:
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
    notes : list of str
    """

    source: str
    modules: list[ModuleSpectrum]
    parameters: int
    suggested: dict[str, int]
    suggested_parameters: dict[str, int]
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON members."""
        return asdict(self)


def spectrum(
    source: str | Path, *, progress: Callable[[int, int], None] = lambda done, total: None
) -> SpectrumReport:
    """Decompose an adapter.

    Parameters
    ----------
    source : str or Path
        An adapter in any format, or a Hub id.
    progress : callable
        Called with bytes done and in total.

    Returns
    -------
    SpectrumReport
    """
    from loraformat.ops.adapters import open_adapter

    with open_adapter(source) as adapter:
        return spectrum_of(adapter, progress=progress)


def spectrum_of(
    adapter: Adapter, *, progress: Callable[[int, int], None] = lambda done, total: None
) -> SpectrumReport:
    """Decompose an adapter that is open.

    Parameters
    ----------
    adapter : Adapter
    progress : callable
    """
    total = sum(delta.a.nbytes + delta.b.nbytes for delta in adapter.deltas.values())
    done, modules = 0, []
    for delta in adapter.deltas.values():
        modules.append(_module(delta))
        done += delta.a.nbytes + delta.b.nbytes
        progress(done, total)
    notes = list(adapter.notes)
    if any(delta.magnitude is not None for delta in adapter.deltas.values()):
        notes.append("DoRA: the spectra are those of the direction B A, without magnitudes")
    return SpectrumReport(
        source=str(adapter.path),
        modules=modules,
        parameters=sum(delta.parameters for delta in adapter.deltas.values()),
        suggested=_suggest(_pooled(module.singular_values for module in modules)),
        suggested_parameters={
            word: sum(module.suggested[word] * _cost(module) for module in modules)
            for word in map(_percent, ENERGIES)
        },
        notes=notes,
    )


def _module(delta: LoraDelta) -> ModuleSpectrum:
    b, a = finite(delta.b), finite(delta.a)
    values = _flat(lora.singular_values(b, a, delta.scaling))
    squares = values.square()
    total = float(squares.sum())
    output, layer = None, layer_of(delta.target)
    if delta.second_moment is not None:
        moment = finite(delta.second_moment)
        output = _suggest(_flat(lora.singular_values(b, a, delta.scaling, moment)))
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
        energies=(squares.cumsum(0) / total).tolist() if total else [1.0] * len(values),
        suggested=_suggest(values),
        output_suggested=output,
    )


def _flat(values: torch.Tensor) -> torch.Tensor:
    return values.square().sum(0).sqrt() if values.ndim == 2 else values


def _pooled(spectra: Iterable[list[float]]) -> torch.Tensor:
    """Return what rank k, given to every module, adds: √Σ σₖ² over the modules."""
    held = [torch.tensor(values, dtype=torch.float64) for values in spectra]
    sums = torch.zeros(max(map(len, held), default=0), dtype=torch.float64)
    for values in held:
        sums[: len(values)] += values.square()
    return sums.sqrt()


def _percent(energy: float) -> str:
    return f"{energy:.0%}"


def _suggest(values: torch.Tensor) -> dict[str, int]:
    return {_percent(energy): lora.energy_rank(values, energy) for energy in ENERGIES}


def _cost(module: ModuleSpectrum) -> int:
    return module.experts * (module.out_features + module.in_features)


def check_plot(path: str | Path) -> None:
    """Raise what `plot` would raise, before anything is computed.

    Raises
    ------
    UsageError
        If the suffix names no format.
    MissingDependencyError
        If matplotlib is not installed.
    """
    if Path(path).suffix.lower() not in _PICTURES:
        raise UsageError(f"a picture is one of {', '.join(_PICTURES)}, not {printable(path)}")
    if find_spec("matplotlib") is None:
        raise MissingDependencyError(
            "a plot needs matplotlib", hint="run: pip install 'loraformat[plot]'"
        )


def plot(report: SpectrumReport, path: str | Path) -> None:
    """Draw an adapter's spectra, to choose a rank by.

    Three panels: singular values, the energy that a rank keeps, and the rank that each module
    needs for 95 %. The suffix of the path chooses the format: png, svg, pdf.

    Parameters
    ----------
    report : SpectrumReport
    path : str or Path

    Raises
    ------
    UsageError, MissingDependencyError
        See `check_plot`.
    """
    check_plot(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.8), layout="constrained", dpi=130)
    left, middle, right = figure.subplots(1, 3, width_ratios=[1, 1, 1.15])
    kinds = list(dict.fromkeys(module.kind for module in report.modules))
    colors = dict(zip(kinds, _colors(len(kinds)), strict=True))
    _draw_values(left, report, colors)
    _draw_energies(middle, report, colors)
    _draw_ranks(figure, right, report, kinds)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=8,
                  frameon=False)  # fmt: skip
    figure.suptitle(f"{Path(report.source).name}: {len(report.modules)} modules, "
                    f"{report.parameters:,} parameters")  # fmt: skip
    figure.savefig(path)


def _colors(count: int) -> list[Any]:
    from matplotlib import colormaps

    if count <= 10:
        return list(colormaps["tab10"].colors[:count])  # type: ignore[attr-defined]
    return [colormaps["turbo"]((i + 0.5) / count) for i in range(count)]


def _draw_values(axes: Axes, report: SpectrumReport, colors: dict[str, Any]) -> None:
    labelled: set[str] = set()
    floor = 1e-7 * max((m.singular_values[0] for m in report.modules if m.norm), default=1.0)
    for module in report.modules:
        label = None if module.kind in labelled else module.kind
        labelled.add(module.kind)
        shown = [value for value in module.singular_values if value > floor]
        axes.plot(range(1, len(shown) + 1), shown, color=colors[module.kind], label=label,
                  alpha=0.6, linewidth=1.1, marker="." if len(shown) < 3 else None)  # fmt: skip
    axes.set(title="singular values of each module's delta", xlabel="index", ylabel="σ",
             yscale="log", xlim=(1, None))  # fmt: skip
    axes.grid(alpha=0.25)


def _draw_energies(axes: Axes, report: SpectrumReport, colors: dict[str, Any]) -> None:
    for module in report.modules:
        axes.plot(range(len(module.energies) + 1), [0, *module.energies],
                  color=colors[module.kind], alpha=0.35, linewidth=0.9)  # fmt: skip
    squares = _pooled(module.singular_values for module in report.modules).square()
    total = float(squares.sum()) or 1.0
    whole = (squares.cumsum(0) / total).tolist()
    axes.plot(range(len(whole) + 1), [0, *whole], color="black", linewidth=2.2)
    for word, rank in report.suggested.items():
        energy = float(word.rstrip("%")) / 100
        axes.plot([0, rank], [energy, energy], color="grey", linewidth=0.8, linestyle=":")
        axes.plot([rank, rank], [0, energy], color="grey", linewidth=0.8, linestyle=":")
    # One below the other: the three ranks may be neighbours, and their labels would overlap.
    advice = "\n".join(f"{word} at rank {rank}" for word, rank in report.suggested.items())
    axes.text(0.97, 0.05, f"all modules (black):\n{advice}", transform=axes.transAxes,
              ha="right", va="bottom", fontsize=10,
              bbox={"facecolor": "white", "alpha": 0.85, "edgecolor": "lightgrey"})  # fmt: skip
    axes.set(title="energy that a rank keeps", xlabel="rank", ylabel="share of ‖D‖²",
             ylim=(0, 1.02), xlim=(0, None))  # fmt: skip
    axes.grid(alpha=0.25)


def _draw_ranks(figure: Figure, axes: Axes, report: SpectrumReport, kinds: list[str]) -> None:
    from matplotlib.ticker import MaxNLocator

    layers = sorted({module.layer for module in report.modules if module.layer is not None})
    rows: list[int | None] = [*layers]
    if any(module.layer is None for module in report.modules):
        rows.append(None)
    grid = torch.full((len(rows), len(kinds)), float("nan"))
    for module in report.modules:
        at = rows.index(module.layer), kinds.index(module.kind)
        # Several of one kind in one layer, experts for example: the hungriest.
        grid[at] = torch.tensor([grid[at], module.suggested["95%"]]).nan_to_num(-1.0).max()
    image = axes.imshow(grid.numpy(), aspect="auto", cmap="viridis", vmin=0)
    figure.colorbar(image, ax=axes, label="rank", ticks=MaxNLocator(integer=True))
    axes.set(title="rank for 95 % of each module's energy", ylabel="layer")
    axes.set_xticks(range(len(kinds)), kinds, rotation=35, ha="right")
    step = max(1, len(rows) // 16)
    marked = range(0, len(rows), step)
    axes.set_yticks(list(marked), ["none" if rows[i] is None else str(rows[i]) for i in marked])
    if grid.numel() <= 160:
        highest = float(grid.nan_to_num(0).max()) or 1.0
        for (i, j), value in ((at, grid[at]) for at in _cells(grid)):
            axes.text(j, i, f"{int(value)}", ha="center", va="center", fontsize=8,
                      color="white" if float(value) < 0.6 * highest else "black")  # fmt: skip


def _cells(grid: torch.Tensor) -> list[tuple[int, int]]:
    found = (~grid.isnan()).nonzero().tolist()
    return [(i, j) for i, j in found]
