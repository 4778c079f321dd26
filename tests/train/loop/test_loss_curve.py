"""The loss curve: its bold line is a mean of what came before, over few steps in a short run."""

from pathlib import Path

import pytest

from loraformat.train.run.loss_curve import _smooth, draw


def test_a_mean_of_what_came_before() -> None:
    smooth = _smooth([float(n) for n in range(40)])
    assert smooth[:3] == [0.0, 0.5, 1.0]
    assert smooth[-1] == pytest.approx(sum(range(32, 40)) / 8)
    assert _smooth([3.0, 1.0]) == [3.0, 1.0]


def test_a_long_run_is_smoothed_over_a_share_of_it() -> None:
    steps = [float(n) for n in range(1000)]
    assert _smooth(steps)[-1] == pytest.approx(sum(steps[-20:]) / 20)


def test_the_picture_says_what_is_what(tmp_path: Path) -> None:
    metrics = [{"step": n, "loss": 3 - n / 10, "learning_rate": 1e-3} for n in range(1, 9)]
    draw([*metrics, {"step": 8, "eval_loss": 2.5}], tmp_path / "loss.svg", "$a on _b")
    drawn = (tmp_path / "loss.svg").read_text(encoding="utf-8")
    said = ["training (mean)", "held-out", "nats per target token", "learning rate", "$a on _b"]
    assert not [text for text in said if text not in drawn]
