"""The loss curve of a run: loss by step, held-out loss, learning rate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loraformat.errors import InputError
from loraformat.ops.plots import as_label, check_picture, colors, save_picture
from loraformat.train.loop.metrics import read_metrics
from loraformat.train.run.run_directory import RunDirectory

__all__ = ["draw", "plot_loss"]

#: Steps that the bold line is a mean of: a share of all, and of a short run as many as will do.
_SMOOTHED, _SHORT = 0.02, 8


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
    check_picture(path)
    run = RunDirectory(Path(adapter))
    if not run.metrics.is_file():
        raise InputError("holds no record of a run", path=run.path, hint="name a run's output")
    draw(read_metrics(run.metrics), Path(path), Path(adapter).name)


def draw(metrics: list[dict[str, Any]], path: Path, title: str) -> None:
    """Draw a record, as `loraformat.train.loop.metrics.read_metrics` returns it.

    The path's suffix chooses the format.
    """
    from matplotlib.figure import Figure

    steps = [line for line in metrics if "loss" in line]
    held = [line for line in metrics if "eval_loss" in line]
    training, held_out = colors(2)
    figure = Figure(figsize=(9, 5.5), layout="constrained", dpi=120)
    axes = figure.subplots()
    if steps:
        numbers, losses = [line["step"] for line in steps], [line["loss"] for line in steps]
        axes.plot(numbers, losses, color=training, alpha=0.3, linewidth=1)
        axes.plot(numbers, _smooth(losses), color=training, linewidth=2, label="training (mean)")
    if held:
        axes.plot([line["step"] for line in held], [line["eval_loss"] for line in held],
                  color=held_out, marker="o", linewidth=2, label="held-out")  # fmt: skip
    axes.set(title=as_label(title), xlabel="step", ylabel="loss (nats per target token)")
    axes.grid(alpha=0.25)
    if steps:
        rates = axes.twinx()
        rates.plot(numbers, [line["learning_rate"] for line in steps], color="grey",
                   linewidth=1, linestyle=":", label="learning rate")  # fmt: skip
        rates.set_ylabel("learning rate", color="grey")
    if steps or held:
        axes.legend()
    save_picture(figure, path)


def _smooth(losses: list[float]) -> list[float]:
    """Return running means that know only what came before."""
    window = max(1, round(len(losses) * _SMOOTHED), min(_SHORT, len(losses) // 4))
    means, total = [], 0.0
    for number, loss in enumerate(losses):
        total += loss - (losses[number - window] if number >= window else 0.0)
        means.append(total / min(number + 1, window))
    return means
