"""What stops a run, and what is left then."""

import json
import math
import shutil

import pytest
import torch

from loraformat.chat_templates import process as template_process
from loraformat.errors import DivergedError, InputError, OutputError, ResourceError, UsageError
from loraformat.ops.convert.convert import convert
from loraformat.train.data.tokenizer import open_tokenizer
from loraformat.train.loop import memory, saved_state
from loraformat.train.loop.metrics import Metrics
from tests.train.loop.tiny_runs import losses, write_rows


def test_nan_names_the_lines(train_to, tmp_path, monkeypatch):
    from loraformat.train.model import TrainableModel

    original = TrainableModel.loss
    calls = []

    def poisoned(self, batch, **options):
        calls.append(batch)
        value = original(self, batch, **options)
        return value * math.nan if len(calls) == 5 else value

    monkeypatch.setattr(TrainableModel, "loss", poisoned)
    with pytest.raises(DivergedError) as caught:
        train_to(tmp_path / "a", save_every=1)
    assert "the loss of step 3 is nan" in str(caught.value)
    assert "data.jsonl: line" in str(caught.value)
    assert not (tmp_path / "a").exists()
    monkeypatch.undo()
    train_to(tmp_path / "a", resume=True)
    train_to(tmp_path / "whole")
    assert losses(tmp_path / "a") == losses(tmp_path / "whole")


def test_a_full_disk(train_to, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    def fill(event):
        if event["event"] == "step" and event["step"] == 3:
            monkeypatch.setattr(saved_state, "write_all", full)

    with pytest.raises(ResourceError, match="disk is full; free some space, then use"):
        train_to(tmp_path / "a", save_every=2, observe=fill)
    monkeypatch.undo()
    assert not (tmp_path / "a").exists()
    found, problems = saved_state.newest(tmp_path / "a.run" / "checkpoints")
    assert (found.step, problems) == (2, [])


def test_a_full_disk_under_the_record(train_to, tmp_path, monkeypatch):
    real = Metrics.add

    def add(self, members):
        if members["step"] == 3:
            raise OSError(28, "No space left on device")
        real(self, members)

    monkeypatch.setattr(Metrics, "add", add)
    with pytest.raises(ResourceError, match=r"a\.run: the disk is full; .* --resume"):
        train_to(tmp_path / "a")
    monkeypatch.undo()
    train_to(tmp_path / "a", resume=True)
    train_to(tmp_path / "whole")
    assert losses(tmp_path / "a") == losses(tmp_path / "whole")


def test_an_adapter_stands_whatever_becomes_of_its_picture(train_to, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("loraformat.train.run.train.loss_curve.draw", full)
    report = train_to(tmp_path / "a", plot=True)
    assert report.notes == ["no loss curve: No space left on device"]
    assert (tmp_path / "a" / "adapter_model.safetensors").is_file()


def test_no_room_for_checkpoints(train_to, tmp_path, monkeypatch):
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    full = usage(9, 9, 1000)
    monkeypatch.setattr("loraformat.train.run.train.shutil.disk_usage", lambda path: full)
    with pytest.raises(ResourceError, match=r"checkpoints and adapter need .* 0\.0 MB free"):
        train_to(tmp_path / "a")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        MemoryError(),
    ],
)
def test_no_memory_while_it_runs(train_to, tmp_path, monkeypatch, error):
    from loraformat.train.model import TrainableModel

    def fail(self, *arguments, **options):
        raise error

    monkeypatch.setattr(TrainableModel, "loss", fail)
    with pytest.raises(ResourceError, match="cpu has too little memory: the run needs about"):
        train_to(tmp_path / "a")


def test_existing_outputs(train_to, tmp_path):
    train_to(tmp_path / "a", steps=1)
    with pytest.raises(OutputError, match="already exists"):
        train_to(tmp_path / "a", steps=1)
    train_to(tmp_path / "a", steps=2, force=True)
    assert len(losses(tmp_path / "a")) == 2
    with pytest.raises(OutputError, match="no such directory"):
        train_to(tmp_path / "nowhere" / "a")


def test_an_input_is_no_output(train_to, tmp_path, place):
    """Found out before the training, and not when it is done."""
    shutil.copytree(place / "bundle", tmp_path / "model")
    for output in (tmp_path / "model", tmp_path / "model" / "inside"):
        with pytest.raises(OutputError, match="the input"):
            train_to(output, base=tmp_path / "model", force=True)
    train_to(tmp_path / "a", steps=1)
    checkpoint = tmp_path / "a.run" / "checkpoints" / "step-00000001" / "adapter"
    for adapter in (tmp_path / "a", checkpoint):
        with pytest.raises(OutputError, match="is or contains the input"):
            train_to(tmp_path / "a", adapter=str(adapter), force=True)
    assert not (tmp_path / "model.run").exists()
    assert checkpoint.is_dir()


def test_no_record_among_the_data(train_to, tmp_path):
    """It would be read as data when the run goes on."""
    (tmp_path / "texts").mkdir()
    write_rows(tmp_path / "texts" / "rows.jsonl", 8)
    with pytest.raises(OutputError, match="lies inside the input"):
        train_to(tmp_path / "texts" / "a", data=tmp_path / "texts", steps=1)
    assert [path.name for path in (tmp_path / "texts").iterdir()] == ["rows.jsonl"]
    train_to(tmp_path / "a", data=tmp_path / "texts", steps=1)


def test_two_in_one_directory(train_to, tmp_path):
    problems = []

    def second(event):
        if event["event"] == "step" and event["step"] == 1:
            with pytest.raises(OutputError, match="another process") as caught:
                train_to(tmp_path / "a", resume=True)
            problems.append(caught.value)

    train_to(tmp_path / "a", observe=second)
    assert len(problems) == 1


def test_a_dry_run_writes_nothing(train_to, tmp_path):
    report = train_to(tmp_path / "a", dry_run=True)
    assert list(tmp_path.iterdir()) == []
    assert report.step_time.whole
    assert report.estimated_seconds == report.step_time.seconds * report.batches
    plan = report.plan
    assert plan.adapter == plan.gradients == plan.optimizer // 2 == 4 * report.trained_parameters
    assert plan.total == sum(plan.parts.values())


def test_the_plan_counts_what_pissa_takes_off_and_small_tensors(train_to, tmp_path):
    report = train_to(tmp_path / "a", dry_run=True, init="pissa", optimizer="adamw-8bit")
    assert report.plan.adapter == 2 * report.plan.gradients == 8 * report.trained_parameters
    # Every factor of the tiny model is smaller than what 8-bit states begin at.
    assert report.plan.optimizer == 8 * report.trained_parameters


def test_the_plan_counts_the_process_that_renders_templates(train_to, tmp_path):
    from tests.train.data.tokenizers_and_templates import TEMPLATES

    turns = [{"role": "user", "content": "bell"}, {"role": "assistant", "content": "book"}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    (tmp_path / "t.jinja").write_text(TEMPLATES["chatml"])
    template, rows = str(tmp_path / "t.jinja"), tmp_path / "rows.jsonl"
    plan = train_to(tmp_path / "a", dry_run=True, data=rows, chat_template=template).plan
    held = memory.resident_of(template_process.shared().number) or 60e6
    assert plan.templates == pytest.approx(held, rel=0.1)
    assert 20e6 < plan.templates < 200e6
    assert plan.to_come == plan.total - plan.process - plan.templates
    # It runs still, but not for these data; for held-out ones it does.
    assert train_to(tmp_path / "a", dry_run=True).plan.templates == 0
    more = {"eval": (str(rows),), "chat_template": template}
    again = train_to(tmp_path / "a", dry_run=True, **more).plan.templates
    assert again == pytest.approx(plan.templates, rel=0.1)


def test_a_time_that_is_reckoned(train_to, tmp_path, monkeypatch):
    """Of a model whose batch would take too long to be timed whole."""
    monkeypatch.setattr("loraformat.train.run.report._PATIENCE", -1.0)
    report = train_to(tmp_path / "a", dry_run=True)
    assert not report.step_time.whole
    assert 1e-5 < report.step_time.seconds < 10
    assert "estimated from one layer's linears" in report.plan_lines()[-1]


def test_a_plan_over_the_limit_is_refused(train_to, tmp_path):
    with pytest.raises(ResourceError) as caught:
        train_to(tmp_path / "a", max_memory=10**8, seq_len=128, batch_size=16, rank=64)
    said = str(caught.value)
    assert "100.0 MB are allowed" in said
    assert "--seq-len 64 saves about" in said
    assert caught.value.exit_code == 6
    assert list(tmp_path.iterdir()) == []


def test_the_tokenizer_must_fit(train_to, tmp_path, place):
    shutil.copytree(place / "dense", tmp_path / "dense")
    tokenizer = open_tokenizer(place / "dense").tokenizer
    tokenizer.add_tokens([f"<extra-{number}>" for number in range(9)])
    tokenizer.save_pretrained(tmp_path / "dense")
    convert(tmp_path / "dense", tmp_path / "model")
    with pytest.raises(InputError, match="knows 2057 tokens, and the model 2048"):
        train_to(tmp_path / "a", base=tmp_path / "model")
    with pytest.raises(UsageError, match="seq-len is 129, and the model takes 128 tokens"):
        train_to(tmp_path / "a", seq_len=129)
