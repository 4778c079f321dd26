"""Opening a model's own tokenizer, and what is refused of it."""

import json

import pytest

from loraformat.errors import InputError, UnsupportedError
from loraformat.train.data import DataOptions, open_data
from loraformat.train.data.tokenizer import TextEncoder, open_tokenizer
from tests.train.data.tokenizers_and_templates import TEMPLATES

ROW = {
    "messages": [
        {"role": "user", "content": "two plus two?"},
        {"role": "assistant", "content": "It is four."},
    ]
}


@pytest.fixture
def saved(chat, tmp_path):
    directory = tmp_path / "model"
    chat.save_pretrained(directory)
    return directory


def test_the_models_own_template_is_used(saved, write, chat):
    path = write("a.jsonl", [ROW])
    opened, again = open_data(path, saved), open_data(path, chat)
    assert opened.preview() == again.preview()
    assert opened.fingerprint == again.fingerprint
    assert opened.preview().endswith("assistant\n⟦It is four.<|im_end|>⟧\n")


def test_another_template_takes_its_place(saved, write, tmp_path):
    template = tmp_path / "llama3.jinja"
    template.write_text(TEMPLATES["llama3"])
    options = DataOptions(chat_template=template)
    opened = open_data(write("a.jsonl", [ROW]), saved, options)
    assert opened.preview().endswith("<|end_header_id|>\n\n⟦It is four.<|eot_id|>⟧")


def test_a_template_that_is_no_template(saved, write, tmp_path):
    template = tmp_path / "bad.jinja"
    template.write_text("{% for m in %}")
    with pytest.raises(InputError, match="line 1: the chat template rejects"):
        open_data(write("a.jsonl", [ROW]), saved, DataOptions(chat_template=template))
    template.write_bytes(b"\xff")
    with pytest.raises(InputError, match="not UTF-8 at byte 0"):
        open_data(write("a.jsonl", [ROW]), saved, DataOptions(chat_template=template))
    with pytest.raises(InputError, match="cannot be opened"):
        open_data(
            write("a.jsonl", [ROW]), saved, DataOptions(chat_template=tmp_path / "none.jinja")
        )


def test_padding_and_truncation_in_the_file_are_not_used(saved, write, dataset):
    fields = json.loads((saved / "tokenizer.json").read_text())
    fields["truncation"] = {
        "direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0
    }  # fmt: skip
    fields["padding"] = {
        "strategy": {"Fixed": 64}, "direction": "Left", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "<s>",
    }  # fmt: skip
    before = open_data(write("a.jsonl", [ROW]), saved)
    (saved / "tokenizer.json").write_text(json.dumps(fields))
    after = open_data(write("a.jsonl", [ROW]), saved)
    assert after.audit.tokens == before.audit.tokens
    assert after.fingerprint == before.fingerprint


def test_no_tokenizer(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(InputError, match="its tokenizer cannot be opened"):
        open_tokenizer(tmp_path)
    with pytest.raises(InputError, match="no such file or directory"):
        open_tokenizer(tmp_path / "none")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model": {"type": "BPE"}}'])
def test_a_broken_tokenizer(saved, content):
    (saved / "tokenizer.json").write_text(content)
    with pytest.raises(InputError, match="its tokenizer cannot be opened"):
        open_tokenizer(saved)


def test_code_of_a_stranger_is_not_run(saved, tmp_path):
    (saved / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass T: pass\n")
    config = json.loads((saved / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": ["evil.T", "evil.T"]}
    config["tokenizer_class"] = "T"
    (saved / "tokenizer_config.json").write_text(json.dumps(config))
    (saved / "config.json").write_text('{"auto_map": {"AutoConfig": "evil.T"}}')
    with pytest.raises(InputError, match="its tokenizer cannot be opened"):
        open_tokenizer(saved)
    assert not (tmp_path / "ran").exists()


def test_a_link_that_leads_out_is_refused(saved, tmp_path):
    (saved / "tokenizer.json").rename(tmp_path / "elsewhere.json")
    (saved / "tokenizer.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(InputError, match="leads out of its directory"):
        open_tokenizer(saved)


def test_a_tokenizer_without_offsets():
    class Slow:
        is_fast = False

    with pytest.raises(UnsupportedError, match="a tokenizer without offsets"):
        TextEncoder(Slow(), "slow")
