"""--chat-template: the template goes with the adapter, and is found there again."""

import json

import pytest

from loraformat.errors import UsageError
from loraformat.ops.check.check import check
from tests.train.data.tokenizers_and_templates import TEMPLATES
from tests.train.loop.test_run import Killed, killer
from tests.train.loop.tiny_runs import files_of

NAME = "chat_template.jinja"
ROW = {"messages": [{"role": "user", "content": "bell"}, {"role": "assistant", "content": "book"}]}


@pytest.fixture
def template(tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_bytes((TEMPLATES["chatml"] + "\r\n{# größe #}\n").encode())
    return path


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROW) + "\n")
    return path


def test_it_lies_beside_every_adapter_of_the_run(train_to, tmp_path, template, rows, place):
    train_to(tmp_path / "a", data=rows, chat_template=str(template), steps=1)
    for adapter in (
        tmp_path / "a",
        tmp_path / "a.run" / "checkpoints" / "step-00000001" / "adapter",
    ):
        assert (adapter / NAME).read_bytes() == template.read_bytes()
    found = {one.rule: one for one in check(tmp_path / "a", base=place / "bundle").findings}
    said = found["CHAT_TEMPLATE_CHANGED"]
    assert said.what == "has its own chat template, but its base has none"
    assert said.level == "warn"
    assert "TOKENIZER_CHANGED" not in found


def test_the_base_s_own_is_no_finding(train_to, tmp_path, template, rows, place):
    import shutil

    from loraformat.ops.convert.convert import convert

    shutil.copytree(place / "dense", tmp_path / "dense")
    shutil.copy(template, tmp_path / "dense" / NAME)
    convert(tmp_path / "dense", tmp_path / "bundle")
    more = {"base": tmp_path / "bundle", "data": rows, "steps": 1, "seq_len": 96}
    train_to(tmp_path / "a", chat_template=str(template), **more)
    assert (tmp_path / "a" / NAME).is_file()
    rules = {one.rule for one in check(tmp_path / "a", base=tmp_path / "bundle").findings}
    assert "CHAT_TEMPLATE_CHANGED" not in rules
    train_to(tmp_path / "b", **more)
    assert not (tmp_path / "b" / NAME).exists()


def test_it_is_not_said_where_it_had_no_part(train_to, tmp_path, template):
    """Prompts with completions are written by no template."""
    train_to(tmp_path / "a", chat_template=str(template), steps=1)
    assert not (tmp_path / "a" / NAME).exists()


def test_gone_on_with(train_to, tmp_path, template, rows):
    more = {"data": rows, "chat_template": str(template), "epochs": 8, "seq_len": 96}
    train_to(tmp_path / "whole", **more)
    with pytest.raises(Killed):
        train_to(tmp_path / "a", save_every=1, observe=killer(2), **more)
    written = template.read_bytes()
    template.write_text(TEMPLATES["llama3"])
    with pytest.raises(UsageError, match="the data's fingerprint was"):
        train_to(tmp_path / "a", resume=True, **more)
    template.write_bytes(written)
    train_to(tmp_path / "a", resume=True, **more)
    one, other = files_of(tmp_path / "a"), files_of(tmp_path / "whole")
    assert one[NAME] == other[NAME] == written
    assert one["adapter_model.safetensors"] == other["adapter_model.safetensors"]


def test_in_a_bundle_and_prompted_with(train_to, run, tmp_path, template, rows, place, monkeypatch):
    import shutil

    from loraformat.train.run import generate

    bundle = shutil.copytree(place / "bundle", tmp_path / "model")
    adapter = bundle / "adapters" / "mine"
    train_to(adapter, base=bundle, data=rows, chat_template=str(template), steps=1)
    assert (adapter / NAME).read_bytes() == template.read_bytes()
    assert run("verify", bundle).code == 0
    seen = []
    real = generate.continuation

    def continuation(model, tokenizer, prompt, *more, **options):
        seen.append(tokenizer.decode(prompt))
        return real(model, tokenizer, prompt, *more, **options)

    monkeypatch.setattr(generate, "continuation", continuation)
    words = ["--prompt", "lamp", "--chat", "--max-tokens", 1, "-q"]
    result = run("generate", bundle, "--adapter", adapter, *words)
    assert (result.code, result.err) == (0, "")
    (asked,) = seen
    assert asked.startswith("<|im_start|>user\nlamp<|im_end|>\n<|im_start|>assistant\n")
    assert run("generate", bundle, *words).code == 2  # the base has none


def test_trained_on_with_another(train_to, tmp_path, template, rows, place):
    import shutil

    from loraformat.ops.convert.convert import convert

    shutil.copytree(place / "dense", tmp_path / "dense")
    (tmp_path / "dense" / NAME).write_text(TEMPLATES["llama3"])
    convert(tmp_path / "dense", tmp_path / "bundle")
    more = {"base": tmp_path / "bundle", "data": rows, "steps": 1, "seq_len": 96}
    train_to(tmp_path / "a", chat_template=str(template), **more)
    more["adapter"] = str(tmp_path / "a")
    (note,) = [one for one in train_to(tmp_path / "b", **more).notes if "template" in one]
    assert note == (
        "the adapter has its own chat template of its own, and the model's is used; to use it, "
        "name it with --chat-template"
    )
    again = train_to(tmp_path / "c", chat_template=str(tmp_path / "a" / NAME), **more)
    assert not [one for one in again.notes if "template" in one]
    assert (tmp_path / "c" / NAME).read_bytes() == template.read_bytes()
