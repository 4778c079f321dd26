"""Plot of the quantization error by kind of weight and layer.

The dotted line is what the same quantization costs normally distributed weights; a weight far
above it has outliers, and is one to keep plain with ``convert --skip``.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy

from loraformat.errors import InputError, UsageError
from loraformat.families.tensor_names import layer_of
from loraformat.model.architecture import kind_of
from loraformat.model.description import InfoReport, ModelInfo, TensorSummary
from loraformat.nf4 import codec
from loraformat.ops.encoding.requantization import rms
from loraformat.ops.plots import as_label, check_picture, colors, save_picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes


__all__ = ["errors_by_layer", "normal_error", "plot_errors"]

_MARKERS = "osD^vP*X<>"
_SAMPLES = 1 << 20
#: Least height of the picture, in percentage points: what differs by less looks alike.
_LEAST = 1.0


def normal_error(block_size: int, double_quant: bool) -> float:
    """Return the relative RMS error of normally distributed weights.

    Examples
    --------
    >>> round(normal_error(64, True), 2)
    0.09
    """
    weights = numpy.random.default_rng(0).standard_normal(_SAMPLES, numpy.float32)
    codes = codec.quantize(weights, block_size=block_size, double_quant=double_quant)
    error, square = codec.quantization_error(weights, codes)
    return math.sqrt(error / square)


def errors_by_layer(tensors: list[TensorSummary]) -> dict[str, dict[int | None, float]]:
    """Return relative RMS errors by kind and layer, weighted by elements.

    The layer is None outside the layers. Tensors without an error are passed over.
    """
    found: dict[str, dict[int | None, list[tuple[float, int]]]] = {}
    for tensor in tensors:
        if tensor.relative_rms_error is None:
            continue
        layer = layer_of(tensor.name)
        row = found.setdefault(kind_of(tensor.name), {})
        error = tensor.relative_rms_error, math.prod(tensor.shape)
        row.setdefault(None if layer is None else layer[1], []).append(error)
    return {kind: {at: rms(errors) for at, errors in row.items()} for kind, row in found.items()}


def plot_errors(report: InfoReport, path: str | Path) -> None:
    """Plot the quantization error of a bundle by layer.

    Parameters
    ----------
    report : InfoReport
        What `info` returned.
    path : str or Path
        A ``.png``, ``.svg`` or ``.pdf`` file; an older picture is replaced.

    Raises
    ------
    UsageError
        If the report is an adapter's.
    InputError
        If the model records no errors.
    MissingDependencyError
        Without matplotlib.
    """
    if not isinstance(report, ModelInfo):
        raise UsageError(
            "--plot shows the quantization errors of a bundle, but this is an adapter",
            hint="run: loraformat spectrum ADAPTER --plot FILE",
        )
    check_picture(path)
    errors = errors_by_layer(report.tensors)
    if not errors:
        raise InputError(
            "records no quantization errors", path=Path(report.path),
            hint="use a bundle that was converted from dense weights",
        )  # fmt: skip
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.8), layout="constrained", dpi=120)
    axes = figure.subplots()
    _draw_errors(axes, errors)
    if len(report.block_sizes) == 1:
        usual = 100 * normal_error(report.block_sizes[0], report.double_quant)
        axes.axhline(usual, color="black", linestyle=":", linewidth=1.5,
                     label=f"normally distributed\nweights: {usual:.2f} %")  # fmt: skip
    _widen(axes)
    blocks = ", ".join(map(str, report.block_sizes))
    axes.set_title(f"{as_label(Path(report.path).name)}: what NF4 costs (block size {blocks})")
    axes.set_ylabel("relative RMS error (%)")
    axes.grid(alpha=0.25)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    save_picture(figure, path)


def _draw_errors(axes: Axes, errors: dict[str, dict[int | None, float]]) -> None:
    from matplotlib.ticker import MaxNLocator

    layers = sorted({at for row in errors.values() for at in row if at is not None})
    outside = layers[-1] + 1 if layers else 0
    alone = any(None in row for row in errors.values())
    chosen = colors(len(errors))
    for number, (kind, row) in enumerate(errors.items()):
        points = sorted((outside if at is None else at, 100 * e) for at, e in row.items())
        axes.plot(*zip(*points, strict=True), color=chosen[number], linewidth=1.5,
                  marker=_MARKERS[number % len(_MARKERS)], label=as_label(kind),
                  markersize=7 if len(layers) <= 12 else 4)  # fmt: skip
    axes.set_xlabel("layer" + (f" ({outside}: outside the layers)" if alone else ""))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _widen(axes: Axes) -> None:
    low, high = axes.get_ylim()
    if high - low < _LEAST:
        middle = (low + high) / 2
        axes.set_ylim(middle - _LEAST / 2, middle + _LEAST / 2)
