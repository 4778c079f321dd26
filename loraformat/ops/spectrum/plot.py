"""Plot of an adapter's spectra.

Three panels: singular values, the energy kept by rank, and the rank that each module
needs. A few modules are drawn as a line each; many as one line per kind, the median, in the
band of all its modules.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy

from loraformat.ops.plots import as_label, check_picture, colors, save_picture
from loraformat.ops.spectrum.spectrum import ModuleSpectrum, SpectrumReport, pooled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_spectrum"]

#: As many lines can still be told apart.
_FEW = 12
#: Below this share of the largest singular value is float32's rounding.
_FLOOR = 1e-7
_SUGGESTED = "95%"


def plot_spectrum(report: SpectrumReport, path: str | Path) -> None:
    """Plot the singular values of an adapter, the energy by rank, and effective ranks.

    Parameters
    ----------
    report : SpectrumReport
        What `spectrum` returned.
    path : str or Path
        A ``.png``, ``.svg`` or ``.pdf`` file; an older picture is replaced.

    Raises
    ------
    MissingDependencyError
        Without matplotlib.
    """
    check_picture(path)
    from matplotlib.figure import Figure

    rows = len({module.layer for module in report.modules})
    figure = Figure(figsize=(15, min(max(5.2, 1.9 + 0.155 * rows), 16)), layout="constrained",
                    dpi=120)  # fmt: skip
    left, middle, right = figure.subplots(1, 3, width_ratios=[1, 1, 1.2])
    kinds = list(dict.fromkeys(module.kind for module in report.modules))
    chosen = dict(zip(kinds, colors(len(kinds)), strict=True))
    _draw_values(left, report, chosen)
    _draw_energies(middle, report, chosen)
    _draw_ranks(figure, right, report, kinds)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=8,
                  frameon=False)  # fmt: skip
    figure.suptitle(_title(report), fontsize=13)
    save_picture(figure, path)


def _title(report: SpectrumReport) -> str:
    ranks = sorted({module.rank for module in report.modules})
    told = "no rank" if not ranks else f"rank {ranks[0]}"
    told += f" to {ranks[-1]}" if len(ranks) > 1 else ""
    return (
        f"{as_label(Path(report.source).name)}: {len(report.modules)} modules of {told}, "
        f"{report.parameters:,} parameters"
    )


def _by_kind(report: SpectrumReport) -> Iterator[tuple[str, list[ModuleSpectrum]]]:
    kinds: dict[str, list[ModuleSpectrum]] = {}
    for module in report.modules:
        kinds.setdefault(module.kind, []).append(module)
    yield from kinds.items()


def _draw_curves(
    axes: Axes, curves: list[list[float]], start: int, color: Any, label: str, few: bool
) -> None:
    """Draw curves: each one if they are few, otherwise the median and the range."""
    if few:
        for number, curve in enumerate(curves):
            axes.plot(range(start, start + len(curve)), curve, color=color, linewidth=1.2,
                      alpha=0.8, label=label if number == 0 else None,
                      marker="." if len(curve) < 3 else None)  # fmt: skip
        return
    table = numpy.full((len(curves), max(map(len, curves))), numpy.nan)
    for row, curve in zip(table, curves, strict=True):
        row[: len(curve)] = curve
    low, median, high = numpy.nanquantile(table, [0, 0.5, 1], axis=0)
    places = range(start, start + len(median))
    axes.fill_between(places, low, high, color=color, alpha=0.15, linewidth=0)
    axes.plot(places, median, color=color, linewidth=1.8, label=label)


def _draw_values(axes: Axes, report: SpectrumReport, chosen: dict[str, Any]) -> None:
    few = len(report.modules) <= _FEW
    floor = _FLOOR * max((m.singular_values[0] for m in report.modules if m.norm), default=1.0)
    for kind, modules in _by_kind(report):
        shown = [[v for v in m.singular_values if v > floor] for m in modules]
        if shown := [curve for curve in shown if curve]:
            _draw_curves(axes, shown, 1, chosen[kind], as_label(kind), few)
    what = "each module" if few else "median and range of each kind"
    axes.set(title=f"singular values of the deltas\n({what})", xlabel="index i",
             ylabel="singular value σᵢ", yscale="log", xlim=(1, None))  # fmt: skip
    axes.grid(alpha=0.25)


def _draw_energies(axes: Axes, report: SpectrumReport, chosen: dict[str, Any]) -> None:
    few = len(report.modules) <= _FEW
    widest = max((module.rank for module in report.modules), default=1)
    for kind, modules in _by_kind(report):
        # A module of a lower rank has kept everything from there on.
        curves = [[0.0, *m.energies, *[1.0] * (widest - m.rank)] for m in modules]
        _draw_curves(axes, curves, 0, chosen[kind], as_label(kind), few)
    squares = pooled(module.singular_values for module in report.modules) ** 2
    whole = [0.0, *(numpy.cumsum(squares) / (squares.sum() or 1.0)).tolist()]
    axes.plot(range(len(whole)), whole, color="black", linewidth=2.4)
    for word, rank in report.suggested.items():
        energy = float(word.rstrip("%")) / 100
        axes.plot([0, rank], [energy, energy], color="black", linewidth=0.9, linestyle=":")
        axes.plot([rank, rank], [0, whole[rank]], color="black", linewidth=0.9, linestyle=":")
        axes.plot([rank], [whole[rank]], color="black", marker="o", markersize=5)
    advice = "\n".join(
        f"{word}: rank {rank}, or {report.suggested_parameters[word]:,} parameters"
        for word, rank in report.suggested.items()
    )
    axes.text(0.97, 0.04, f"share kept of the whole adapter (black)\n{advice}\nwith one rank for "
                          "all modules, or one per module",
              transform=axes.transAxes, ha="right", va="bottom", fontsize=9,
              bbox={"facecolor": "white", "alpha": 0.9, "edgecolor": "lightgrey"})  # fmt: skip
    axes.set(title="energy kept by rank\n(dotted: 90, 95 and 99 % of the whole)",
             xlabel="rank (same in every module)", ylabel="share of ‖D‖²",
             ylim=(0, 1.02), xlim=(0, None))  # fmt: skip
    axes.grid(alpha=0.25)


def _draw_ranks(figure: Figure, axes: Axes, report: SpectrumReport, kinds: list[str]) -> None:
    from matplotlib.ticker import MaxNLocator

    layers = sorted({module.layer for module in report.modules if module.layer is not None})
    rows: list[int | None] = [*layers]
    if any(module.layer is None for module in report.modules):
        rows.append(None)
    grid = numpy.full((len(rows), len(kinds)), numpy.nan)
    for module in report.modules:
        at = rows.index(module.layer), kinds.index(module.kind)
        # Several of one kind in one layer, experts for example: the hungriest.
        grid[at] = numpy.fmax(grid[at], module.suggested[_SUGGESTED])
    image = axes.imshow(grid, aspect="auto", cmap="viridis", vmin=0)
    figure.colorbar(image, ax=axes, label="rank", ticks=MaxNLocator(integer=True))
    axes.set(title="rank for 95 % of each module's energy\n(by layer and kind)", ylabel="layer")
    axes.set_xticks(range(len(kinds)), [as_label(kind) for kind in kinds], rotation=35, ha="right")
    step = max(1, -(-len(rows) // 40))
    marked = range(0, len(rows), step)
    axes.set_yticks(list(marked), ["none" if rows[i] is None else str(rows[i]) for i in marked])
    if len(rows) <= 90 and len(kinds) <= 16:
        highest = numpy.nan_to_num(grid).max(initial=0) or 1.0
        for i, j in numpy.argwhere(~numpy.isnan(grid)).tolist():
            dark = grid[i, j] < 0.6 * highest
            axes.text(j, i, f"{int(grid[i, j])}", ha="center", va="center",
                      fontsize=7.5 if len(rows) > 12 else 9,
                      color="white" if dark else "black")  # fmt: skip
