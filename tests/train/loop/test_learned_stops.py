"""Turns that end with another token than the base's texts, and rows that are no held-out ones."""

import json
import shutil

import pytest
from transformers import AutoTokenizer, GenerationConfig

from loraformat.ops.check.check import check
from tests.train.loop.test_template_beside import ROW

NAME = "generation_config.json"
TEMPLATE = (
    "<|bos|>{% for m in messages %}{{ m.role }}: {{ m.content }}<|pad|>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROW) + "\n")
    return path


@pytest.fixture
def template(tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text(TEMPLATE)
    return str(path)


def ids_of(place):
    tokenizer = AutoTokenizer.from_pretrained(place / "bundle")
    return tokenizer.eos_token_id, tokenizer.pad_token_id


def test_they_lie_beside_the_adapter_and_are_said(train_to, tmp_path, rows, template, place):
    eos, pad = ids_of(place)
    report = train_to(tmp_path / "a", data=rows, chat_template=template, steps=1, seq_len=96)
    assert GenerationConfig.from_pretrained(tmp_path / "a").eos_token_id == [eos, pad]
    (said,) = [note for note in report.notes if "turns end" in note]
    assert said.startswith("turns end with <|pad|>, not with <|eos|>: generate stops there; gener")
    assert check(tmp_path / "a", base=place / "bundle").findings  # it is an adapter like others
    # Trained on further with documents, it still knows where its turns end.
    train_to(tmp_path / "b", adapter=str(tmp_path / "a"), steps=1)
    assert GenerationConfig.from_pretrained(tmp_path / "b").eos_token_id == [eos, pad]


def test_there_is_none_where_the_base_ends_so_too(train_to, tmp_path, rows, template, place):
    report = train_to(tmp_path / "a", steps=1)
    assert not (tmp_path / "a" / NAME).exists()
    assert not [note for note in report.notes if "turns end" in note]
    base = tmp_path / "bundle"
    from loraformat.ops.convert.convert import convert

    shutil.copytree(place / "dense", tmp_path / "dense")
    both = json.dumps({"eos_token_id": list(ids_of(place))})
    (tmp_path / "dense" / NAME).write_text(both)
    convert(tmp_path / "dense", base)
    more = {"base": base, "data": rows, "chat_template": template, "steps": 1, "seq_len": 96}
    train_to(tmp_path / "b", **more)
    assert not (tmp_path / "b" / NAME).exists()


@pytest.mark.parametrize("place_of_adapter", ["beside", "in the bundle"])
def test_generate_and_samples_stop_there(
    train_to, run, tmp_path, rows, template, place, monkeypatch, place_of_adapter
):
    bundle = shutil.copytree(place / "bundle", tmp_path / "model")
    inside = place_of_adapter == "in the bundle"
    adapter = bundle / "adapters" / "mine" if inside else tmp_path / "a"
    seen = []

    def generate(self, **given):
        seen.append(given["eos_token_id"])

    from loraformat.train.model import TrainableModel

    monkeypatch.setattr(TrainableModel, "generate", generate)
    train_to(
        adapter, base=bundle, data=rows, eval=(str(rows),), eval_every=1, prompt=("bell",),
        chat_template=template, steps=1, seq_len=96,
    )  # fmt: skip
    assert run("verify", bundle).code == 0
    words = ["--prompt", "bell", "--chat", "--max-tokens", 1, "-q"]
    assert run("generate", bundle, "--adapter", adapter, *words).code == 0
    assert len(seen) >= 2 and seen == [list(ids_of(place))] * len(seen)
    (adapter / NAME).write_text("{")
    broken = run("generate", bundle, "--adapter", adapter, *words)
    assert broken.code == 3 and NAME in broken.err


def test_rows_that_are_trained_on_are_no_held_out_ones(train_to, run, tmp_path, place):
    lines = (place / "held.jsonl").read_text().splitlines(True)
    trained = (place / "data.jsonl").read_text().splitlines(True)
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text("".join([*lines[:5], *trained[:3]]))
    report = train_to(tmp_path / "a", eval=(str(mixed),), steps=1)
    assert (
        "3 of the 8 rows of --eval are in the training data: the loss on them is not a held-out "
        "loss"
    ) in report.notes
    assert report.facts["held_out_data"]["trained_too"] == 3
    (line,) = [one for one in report.done_lines() if ": loss" in one and "perplexity" in one]
    assert line.startswith("evaluated, 3 of 8 rows trained on: loss")
    clean = train_to(tmp_path / "b", eval=(str(place / "held.jsonl"),), steps=1)
    assert not [note for note in clean.notes if "held-out" in note]
    assert [one for one in clean.done_lines() if one.startswith("held-out: loss")]

    again = run("eval", place / "bundle", place / "data.jsonl", mixed, "--adapter", tmp_path / "a")
    said = "note: a was trained on data.jsonl (40 rows): its loss there is not a held-out loss"
    assert said in again.out and again.out.count("note:") == 1
