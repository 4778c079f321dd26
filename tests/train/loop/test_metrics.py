"""The run's record."""

import pytest

from loraformat.errors import MissingDependencyError
from loraformat.train.loop import metrics as module
from loraformat.train.loop.metrics import Metrics, read_metrics


def test_a_record_is_cut_back_to_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with Metrics(path) as metrics:
        metrics.add({"step": 1, "loss": 3.0})
        kept = metrics.position()
        metrics.add({"step": 2, "loss": 2.0})
    with Metrics(path, position=kept) as metrics:
        metrics.add({"step": 2, "loss": 2.0, "text": "é\n"})
    assert read_metrics(path) == [
        {"step": 1, "loss": 3.0},
        {"step": 2, "loss": 2.0, "text": "é\n"},
    ]


def test_a_torn_line_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"ste')
    assert read_metrics(path) == [{"step": 1}]


def test_tensorboard_reads_what_is_told(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = tmp_path / "board"
    with Metrics(tmp_path / "metrics.jsonl", tensorboard=board) as metrics:
        for step in (1, 2, 3):
            metrics.add({"step": step, "loss": 4.0 - step})
    events = EventAccumulator(str(board))
    events.Reload()
    told = [(event.step, event.value) for event in events.Scalars("loss")]
    assert told == [(1, 3.0), (2, 2.0), (3, 1.0)]


def test_tensorboard_missing(monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="tensorboard"):
        module.check_tensorboard()
