"""Whole runs of a tiny model: what they write, and that they come to the same bytes again."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from loraformat.errors import InputError, OutputError, UsageError
from loraformat.train.loop import saved_state
from loraformat.train.loop.metrics import read_metrics
from tests.train.loop.tiny_runs import files_of, losses, write_rows


class Killed(BaseException):
    pass


def killer(step, event="checkpoint"):
    """Ends the run as a kill would, after the checkpoint of a step."""

    def observe(told):
        if told["event"] == event and told["step"] == step:
            raise Killed

    return observe


def test_a_run_learns_and_says_so(train_to, tmp_path, place):
    told = []
    report = train_to(
        tmp_path / "a", epochs=12, observe=told.append, eval=(str(place / "held.jsonl"),),
        eval_every=20, prompt=("bell book",), plot=True,
    )  # fmt: skip
    facts = report.facts
    assert facts["last_loss"] < facts["first_loss"] - 1
    assert facts["heldout_after"] < facts["heldout_before"] - 1
    assert facts["data"]["files"][0]["name"] == "data.jsonl"
    assert facts["data"]["files"][0]["rows"] == 40
    assert len(facts["data"]["files"][0]["sha256"]) == 64
    assert facts["prompt_format"] == "{prompt}{completion}"
    assert facts["steps"] == report.steps == len(losses(tmp_path / "a"))
    assert facts["trained_tokens"] == 12 * facts["data"]["trained_tokens"]
    record = json.loads((tmp_path / "a" / "training_record.json").read_text())
    assert record["training"] == json.loads(json.dumps(facts))
    directory = tmp_path / "a.run"
    assert {path.name for path in directory.iterdir()} == {
        "checkpoints", "metrics.jsonl", "run.yaml", "loss.png",
    }  # fmt: skip
    assert (directory / "loss.png").read_bytes().startswith(b"\x89PNG")
    kinds = {event["event"] for event in told}
    assert kinds == {"step", "evaluation", "sample", "checkpoint"}
    last = directory / "checkpoints" / saved_state.name_of(report.steps)
    saved = load_file(last / "adapter" / "adapter_model.safetensors")
    final = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert all(torch.equal(final[name], saved[name]) for name in final)


@pytest.mark.parametrize("conversations", [False, True])
def test_samples_are_asked_for_as_the_data_ask(train_to, tmp_path, monkeypatch, conversations):
    from loraformat.train.run import train
    from tests.train.data.tokenizers_and_templates import TEMPLATES

    seen = []
    real = train.text_generation.continuation

    def continuation(model, tokenizer, prompt, *more, **options):
        seen.append(tokenizer.decode(prompt))
        return real(model, tokenizer, prompt, *more, **options)

    monkeypatch.setattr(train.text_generation, "continuation", continuation)
    turns = [{"role": "user", "content": "bell"}, {"role": "assistant", "content": "book"}]
    row = {"messages": turns} if conversations else {"prompt": "bell", "completion": " book"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "t.jinja").write_text(TEMPLATES["chatml"])
    rows = tmp_path / "rows.jsonl"
    train_to(
        tmp_path / "a", data=rows, eval=(str(rows),), prompt=("lamp",), steps=1,
        chat_template=str(tmp_path / "t.jinja"),
    )  # fmt: skip
    wanted = "<|im_start|>user\nlamp<|im_end|>\n<|im_start|>assistant\n"
    assert seen == 2 * [wanted if conversations else "<|bos|>lamp"]


def test_the_same_options_write_the_same_bytes(train_to, tmp_path):
    for name in ("a", "b"):
        train_to(tmp_path / name)
    one, other = files_of(tmp_path / "a"), files_of(tmp_path / "b")
    assert one.pop("training_record.json") != other.pop("training_record.json")  # the output's name
    assert one == other


def test_another_seed_writes_others(train_to, tmp_path):
    train_to(tmp_path / "a")
    train_to(tmp_path / "b", seed=1)
    one, other = files_of(tmp_path / "a"), files_of(tmp_path / "b")
    assert one["adapter_model.safetensors"] != other["adapter_model.safetensors"]


@pytest.mark.parametrize(
    ("step", "changes"),
    [
        (1, {}),
        (4, {}),
        (5, {}),
        # What is taken off beside the factors is no parameter: it is found in the base again.
        (3, {"init": "pissa"}),
        (3, {"init": "pissa", "dora": True}),
    ],
)
def test_killed_and_gone_on_is_bit_for_bit(train_to, tmp_path, monkeypatch, step, changes):
    """P7."""
    output = Path("a")  # the record holds the name
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "whole")
    train_to(output, **changes)
    monkeypatch.chdir(tmp_path / "killed")
    with pytest.raises(Killed):
        train_to(output, save_every=step, observe=killer(step), **changes)
    assert train_to(output, resume=True, **changes).notes == []
    assert files_of(tmp_path / "whole" / "a") == files_of(tmp_path / "killed" / "a")
    assert losses(tmp_path / "whole" / "a") == losses(tmp_path / "killed" / "a")


def test_ways_that_do_not_change_the_bytes(train_to, tmp_path):
    """Where states lie, how often is saved, TensorBoard, whether layers keep their activations;
    on a CPU the deterministic mode, too."""
    train_to(tmp_path / "a", activation_memory=10**9)
    train_to(
        tmp_path / "b", optimizer_states="disk", save_every=1, tensorboard=True,
        deterministic=True, activation_memory=0,
    )  # fmt: skip
    one, other = files_of(tmp_path / "a"), files_of(tmp_path / "b")
    name = "adapter_model.safetensors"
    assert one[name] == other[name]
    assert any((tmp_path / "b.run" / "tensorboard").iterdir())


def test_tensorboard_shows_each_step_once_after_a_resume(train_to, tmp_path, place):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    more = {"tensorboard": True, "eval": (str(place / "held.jsonl"),), "eval_every": 2}
    more["prompt"] = ("bell",)
    with pytest.raises(Killed):
        train_to(tmp_path / "a", save_every=2, observe=killer(3, "step"), **more)
    steps = train_to(tmp_path / "a", resume=True, **more).steps
    events = EventAccumulator(str(tmp_path / "a.run" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(1, steps + 1))
    evaluated = [*range(0, steps, 2), steps]
    assert [event.step for event in events.Scalars("eval_loss")] == evaluated
    (text,) = events.Tensors("sample/text_summary")[0].tensor_proto.string_val
    assert text.decode().startswith("bell⟦")


def test_resume_without_a_checkpoint_begins(train_to, tmp_path):
    report = train_to(tmp_path / "a", resume=True)
    assert report.notes == ["there was no checkpoint; the run started from the beginning"]
    assert (tmp_path / "a" / "adapter_model.safetensors").is_file()
    before = files_of(tmp_path / "a")
    assert not report.was_complete
    again = train_to(tmp_path / "a", resume=True)
    assert again.was_complete and again.notes == []
    assert files_of(tmp_path / "a") == before
    assert again.facts["last_loss"] == report.facts["last_loss"]


def test_a_damaged_checkpoint_is_passed_over(train_to, tmp_path):
    train_to(tmp_path / "whole")
    with pytest.raises(Killed):
        train_to(tmp_path / "a", save_every=2, observe=killer(4))
    newest = tmp_path / "a.run" / "checkpoints" / "step-00000004" / "state.safetensors"
    newest.write_bytes(newest.read_bytes()[:-7])
    report = train_to(tmp_path / "a", resume=True)
    assert "skipped" in report.notes[0]
    assert losses(tmp_path / "a") == losses(tmp_path / "whole")


def test_only_damaged_checkpoints(train_to, tmp_path):
    """They are not thrown away unasked."""
    with pytest.raises(Killed):
        train_to(tmp_path / "a", save_every=2, observe=killer(2))
    (path,) = (tmp_path / "a.run" / "checkpoints").iterdir()
    (path / "checkpoint.json").write_text("{}")
    with pytest.raises(InputError, match="none of the checkpoints is intact"):
        train_to(tmp_path / "a", resume=True)
    assert (path / "state.safetensors").is_file()
    train_to(tmp_path / "a", force=True)


def test_another_run_is_not_gone_on_with(train_to, tmp_path, place):
    with pytest.raises(Killed):
        train_to(tmp_path / "a", save_every=2, observe=killer(2))
    with pytest.raises(UsageError, match=r"--lr was 0\.005 and is 0\.001"):
        train_to(tmp_path / "a", resume=True, lr=1e-3)
    other = write_rows(tmp_path / "other.jsonl", 40, seed=9)
    with pytest.raises(UsageError, match="the data's fingerprint was"):
        train_to(tmp_path / "a", resume=True, data=other)
    with pytest.raises(OutputError, match="holds a run already"):
        train_to(tmp_path / "a")
    train_to(tmp_path / "a", resume=True, keep=1)


def test_the_epoch_of_a_step_is_how_many_have_been_seen_behind_it(train_to, tmp_path):
    report = train_to(
        tmp_path / "a", epochs=3, grad_accum=2, batch_size=8, packing=False, shuffle=False
    )  # fmt: skip
    record = read_metrics(tmp_path / "a.run" / "metrics.jsonl")
    assert report.batches == 3 * 5
    assert [line["epoch"] for line in record] == [0, 0, 1, 1, 2, 2, 2, 3]


def test_every_member_of_the_record_is_in_the_documents(train_to, tmp_path, place):
    train_to(tmp_path / "a", steps=1, eval=(str(place / "held.jsonl"),), prompt=("bell",))
    record = read_metrics(tmp_path / "a.run" / "metrics.jsonl")
    text = (Path(__file__).parents[3] / "docs" / "training.md").read_text()
    members = {member for line in record for member in line}
    assert {"epoch", "eval_loss", "text"} <= members
    assert {member for member in members if f"`{member}`" not in text} == set()


def test_states_and_steps_of_the_epochs(train_to, tmp_path):
    report = train_to(tmp_path / "a", epochs=3, grad_accum=4)
    assert report.steps == math.ceil(report.batches / 4)
    assert report.facts["trained_tokens"] == 3 * report.facts["data"]["trained_tokens"]
    report = train_to(tmp_path / "b", steps=3)
    assert (report.steps, report.facts["steps"]) == (3, 3)


def test_layer_major_and_accumulation_are_one_step(train_to, tmp_path):
    """P4: four rows at once, four times one, and four rows layer by layer."""
    ways = {
        "rows": {"batch_size": 4, "grad_accum": 1},
        "accumulated": {"batch_size": 1, "grad_accum": 4},
        "layers": {"batch_size": 1, "grad_accum": 4, "layer_major": True},
    }
    found = {}
    for name, way in ways.items():
        train_to(
            tmp_path / name, packing=False, shuffle=False, dropout=0.0, steps=4, optimizer="sgd",
            lr=0.5, **way,
        )  # fmt: skip
        found[name] = (
            load_file(tmp_path / name / "adapter_model.safetensors"),
            losses(tmp_path / name),
        )
    for name in ("accumulated", "layers"):
        assert found[name][1] == pytest.approx(found["rows"][1], abs=2e-6)
        for key, tensor in found["rows"][0].items():
            torch.testing.assert_close(found[name][0][key], tensor, rtol=1e-5, atol=1e-6)


def test_the_best_adapter_and_early_stop(train_to, tmp_path, place):
    told = []
    report = train_to(
        tmp_path / "a", epochs=30, lr=0.3, eval=(str(place / "held.jsonl"),), eval_every=2,
        early_stop=2, best=True, observe=told.append, clip=0.0,
    )  # fmt: skip
    held = {event["step"]: event["eval_loss"] for event in told if event["event"] == "evaluation"}
    best = min(held, key=held.get)
    assert report.facts["best_step"] == best
    assert report.facts["steps"] == best + 4 < report.steps
    assert report.facts["heldout_after"] == held[best]
    last = tmp_path / "a.run" / "checkpoints" / f"step-{report.facts['steps']:08d}" / "adapter"
    name = "adapter_model.safetensors"
    assert (last / name).read_bytes() != (tmp_path / "a" / name).read_bytes()
    again = train_to(
        tmp_path / "a", epochs=30, lr=0.3, eval=(str(place / "held.jsonl"),), eval_every=2,
        early_stop=2, best=True, clip=0.0, resume=True,
    )  # fmt: skip
    assert again.was_complete and again.notes == []


def test_an_adapter_into_the_bundle_and_on_from_it(train_to, tmp_path, place):
    bundle = tmp_path / "model"
    shutil.copytree(place / "bundle", bundle)
    train_to(bundle / "adapters" / "first", base=bundle)
    assert (tmp_path / "model.first.run" / "metrics.jsonl").is_file()
    report = train_to(tmp_path / "second", base=bundle, adapter=str(bundle / "adapters" / "first"))
    first = losses_of(tmp_path / "model.first.run")
    assert report.facts["first_loss"] < first[0]


def losses_of(directory):
    return [x["loss"] for x in read_metrics(directory / "metrics.jsonl") if "loss" in x]
