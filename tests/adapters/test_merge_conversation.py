"""A merged model is prompted, and stops, as the adapter in it was trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from loraformat_converters.gguf.container.reader import open_gguf
from transformers import AutoTokenizer, GenerationConfig

from loraformat.demo import ADAPTERS, SMALL_MODEL
from loraformat.ops.convert.convert import convert
from loraformat.ops.merge.merge import merge
from loraformat.ops.unmerge.unmerge import unmerge

BASE_TEMPLATE = "{% for m in messages %}base {{ m['content'] }}{% endfor %}"
OWN = "{% for m in messages %}<own>{{ m['content'] }}{% endfor %}"
CHAT = [{"role": "user", "content": "hi"}]


@pytest.fixture
def base(tmp_path):
    path = shutil.copytree(SMALL_MODEL, tmp_path / "base")
    config = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(
        json.dumps({**config, "chat_template": BASE_TEMPLATE})
    )
    (path / "generation_config.json").write_text('{"eos_token_id": 1, "top_p": 0.9}')
    return path


def adapter(path, template=OWN, stops=None, name="manual"):
    shutil.copytree(ADAPTERS[name], path)
    if template is not None:
        (path / "chat_template.jinja").write_text(template)
    if stops is not None:
        (path / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    return path


def prompt(path):
    tokenizer = AutoTokenizer.from_pretrained(path)
    return tokenizer.apply_chat_template(CHAT, tokenize=False)


def test_a_dense_model_has_template_and_stops_of_the_adapter(base, tmp_path):
    report = merge(base, [adapter(tmp_path / "a", stops=[1, 7])], tmp_path / "out")
    assert prompt(tmp_path / "out") == "<own>hi"
    settings = GenerationConfig.from_pretrained(tmp_path / "out")
    assert settings.eos_token_id == [1, 7] and settings.top_p == 0.9
    assert any("replaces the base's" in note for note in report.notes)
    assert any("tokens 1, 7" in note for note in report.notes)
    said = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert "chat_template" not in said, "no second one, which others would read"


def test_a_base_without_a_template_gets_it(tmp_path):
    report = merge(SMALL_MODEL, [adapter(tmp_path / "a")], tmp_path / "out")
    assert prompt(tmp_path / "out") == "<own>hi"
    assert any("the base had none" in note for note in report.notes)


def test_gguf_files_and_bundles_have_it_too(base, tmp_path):
    lora = adapter(tmp_path / "a")
    merge(base, [lora], tmp_path / "out.gguf")
    with open_gguf(tmp_path / "out.gguf") as file:
        assert file.text("tokenizer.chat_template") == OWN
    merge(base, [lora], tmp_path / "again", to="loraformat", requantize=True)
    assert prompt(tmp_path / "again") == "<own>hi"


def test_beside_the_codes_it_lies_with_the_adapter(base, tmp_path):
    convert(base, tmp_path / "bundle")
    lora = adapter(tmp_path / "a", stops=[1, 7])
    merge(tmp_path / "bundle", [lora], tmp_path / "both", to="loraformat")
    beside = tmp_path / "both" / "adapters" / "a"
    assert (beside / "chat_template.jinja").read_text() == OWN
    merge(tmp_path / "both", [beside], tmp_path / "dense")
    assert prompt(tmp_path / "dense") == "<own>hi"
    assert GenerationConfig.from_pretrained(tmp_path / "dense").eos_token_id == [1, 7]


def test_the_same_template_is_not_spoken_of(base, tmp_path):
    lora = adapter(tmp_path / "a", template=BASE_TEMPLATE + "\n", stops=[1])
    report = merge(base, [lora], tmp_path / "out")
    assert not [note for note in report.notes if "chat template" in note or "texts end" in note]
    for name in ("tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()


def test_of_two_templates_the_first_is_kept_and_the_other_named(base, tmp_path):
    first = adapter(tmp_path / "a")
    second = adapter(tmp_path / "b", template="other", name="tests")
    report = merge(base, [first, second], tmp_path / "out")
    assert prompt(tmp_path / "out") == "<own>hi"
    assert any(str(second) in note and "differs" in note for note in report.notes)


def test_other_named_templates_stay(base, tmp_path):
    config = json.loads((base / "tokenizer_config.json").read_text())
    named = [
        {"name": "default", "template": BASE_TEMPLATE}, {"name": "tool_use", "template": "tools"}
    ]  # fmt: skip
    (base / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": named}))
    merge(base, [adapter(tmp_path / "a")], tmp_path / "out.gguf")
    with open_gguf(tmp_path / "out.gguf") as file:
        assert file.text("tokenizer.chat_template") == OWN
        assert file.text("tokenizer.chat_template.tool_use") == "tools"


def test_another_tokenizer_is_named(base, tmp_path):
    lora = adapter(tmp_path / "a", template=None)
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    Path(lora / "tokenizer.json").write_text(json.dumps(tokenizer))
    report = merge(base, [lora], tmp_path / "out")
    assert any("the base's is kept" in note for note in report.notes)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (
        base / "tokenizer.json"
    ).read_bytes()


def test_a_gguf_adapter_says_that_its_template_stays_behind(base, tmp_path):
    lora = adapter(tmp_path / "a")
    report = convert(lora, tmp_path / "lora.gguf", base=base)
    assert any("--chat-template-file" in note for note in report.notes)
    plain = adapter(tmp_path / "b", template=BASE_TEMPLATE)
    report = convert(plain, tmp_path / "plain.gguf", base=base)
    assert not any("template" in note for note in report.notes)


def test_taken_out_again_it_is_said_whose_template_stays(base, tmp_path):
    lora = adapter(tmp_path / "a")
    merge(base, [lora], tmp_path / "out", undo=tmp_path / "undo.lfu")
    exact = unmerge(tmp_path / "out", tmp_path / "back", undo=tmp_path / "undo.lfu")
    near = unmerge(tmp_path / "out", tmp_path / "near", adapter=[lora])
    for report in (exact, near):
        assert any("still that of" in note for note in report.notes)
    plain = adapter(tmp_path / "b", template=None)
    merge(base, [plain], tmp_path / "plain")
    report = unmerge(tmp_path / "plain", tmp_path / "again", adapter=[plain])
    assert not any("template" in note for note in report.notes)


def test_what_is_subtracted_brings_no_template(base, tmp_path):
    merge(base, [adapter(tmp_path / "a", stops=[7])], tmp_path / "out", weight=[-1])
    assert prompt(tmp_path / "out") == "base hi"
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == 1
