"""``loraformat.plot_errors``, ``plot_spectrum`` and ``plot_loss``: pictures of reports."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loraformat.ops.info.report import InfoReport
    from loraformat.ops.spectrum.spectrum import SpectrumReport

__all__ = ["plot_errors", "plot_loss", "plot_spectrum"]


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
    from loraformat.errors import UsageError
    from loraformat.ops.info.error_plot import plot_errors as draw
    from loraformat.ops.info.report import ModelInfo

    if not isinstance(report, ModelInfo):
        raise UsageError(
            "--plot shows the quantization errors of a bundle, but this is an adapter",
            hint="run: loraformat spectrum ADAPTER --plot FILE",
        )
    draw(report, path)


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
    from loraformat.ops.spectrum.plot import plot

    plot(report, path)


def plot_loss(adapter: str | Path, path: str | Path) -> None:
    """Plot the loss curve of a training run, as `train` does at its end.

    Parameters
    ----------
    adapter : str or Path
        The run's output, beside which its record is.
    path : str or Path
        A ``.png``, ``.svg`` or ``.pdf`` file; an older picture is replaced.

    Raises
    ------
    InputError
        If there is no record of a run.
    MissingDependencyError
        Without matplotlib.
    """
    from loraformat.errors import InputError
    from loraformat.ops.plots import check_picture
    from loraformat.train.loop.metrics import read_metrics
    from loraformat.train.run.loss_curve import draw
    from loraformat.train.run.run_directory import RunDirectory

    check_picture(path)
    run = RunDirectory(Path(adapter))
    if not run.metrics.is_file():
        raise InputError("holds no record of a run", path=run.path, hint="name a run's output")
    draw(read_metrics(run.metrics), Path(path), Path(adapter).name)
