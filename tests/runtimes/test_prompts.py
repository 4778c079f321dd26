"""TOKENIZER_CHANGED and CHAT_TEMPLATE_CHANGED: what counts as another tokenizer or template."""

from __future__ import annotations

import json
import shutil

import pytest

from loraformat.demo import SMALL_MODEL
from loraformat.errors import InputError
from loraformat.model.checkpoint import CarriedFile
from loraformat.model.tokenizer_files import CarriedTokenizer
from loraformat.ops.check.check import check
from loraformat.ops.check.prompts import template_change, tokenizer_change
from loraformat.ops.convert.convert import convert


def carried(**files):
    """Files by name; ``__`` is a dot. What is no text is JSON."""
    made = []
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        data = text.encode()
        made.append(CarriedFile(name.replace("__", "."), len(data), lambda data=data: data))
    return CarriedTokenizer(made, "somewhere")


def bpe(vocabulary, merges=(), added=()):
    return {
        "model": {"type": "BPE", "vocab": vocabulary, "merges": list(merges)},
        "added_tokens": [{"id": number, "content": text} for text, number in added],
    }


ONE = {"a": 0, "b": 1, "ab": 2}


@pytest.mark.parametrize(
    ("ours", "base"),
    [
        (bpe(ONE, ["a b"]), bpe(ONE, [["a", "b"]])),  # the two ways to write merges
        (bpe(ONE, added=[("<s>", 3)]), bpe({**ONE, "<s>": 3})),
        (bpe({"a": 0}), bpe(ONE)),  # none that the base lacks
        ({"model": {"vocab": [["a", -1.5], ["b", -2.5]]}}, {"model": {"vocab": []}}),
        ({**bpe(ONE), "padding": {}, "pre_tokenizer": None}, {**bpe(ONE), "truncation": {}}),
        ({"model": "?"}, bpe(ONE)),
    ],
)
def test_the_same_tokenizer(ours, base):
    assert tokenizer_change(carried(tokenizer__json=ours), carried(tokenizer__json=base)) is None


@pytest.mark.parametrize(
    ("ours", "base", "said"),
    [
        (bpe(ONE, added=[("<x>", 3)]), bpe(ONE), "has <x>, which the base's has not"),
        (bpe(ONE, added=[("<x>", 3), ("<y>", 4)]), bpe(ONE), "has <x> and 1 more, which"),
        (bpe({**ONE, "b": 7}), bpe(ONE), "gives b the number 7, and the base's 1"),
        (bpe(ONE, ["a b"]), bpe(ONE, ["b a"]), "its tokenizer has different merges"),
        ({"model": {"vocab": [["a", 0.0]]}}, {"model": {"vocab": [["b", 0.0], ["a", 0.0]]}},
         "gives a the number 0, and the base's 1"),
    ],
)  # fmt: skip
def test_another_tokenizer(ours, base, said):
    assert said in tokenizer_change(carried(tokenizer__json=ours), carried(tokenizer__json=base))


def test_older_files():
    wordpiece = carried(vocab__txt="[UNK]\na\n")
    assert tokenizer_change(wordpiece, carried(vocab__txt="[UNK]\na\nb\n")) is None
    said = tokenizer_change(wordpiece, carried(vocab__txt="a\n[UNK]\n"))
    assert said == "its tokenizer gives [UNK] the number 0, and the base's 1"
    gpt2 = carried(vocab__json=ONE, added_tokens__json={"<x>": 3})
    assert "has <x>" in tokenizer_change(gpt2, carried(tokenizer__json=bpe(ONE)))
    pieces = carried(tokenizer__model="one")
    assert (
        tokenizer_change(pieces, carried(tokenizer__model="two"))
        == "its tokenizer.model is another"
    )
    assert tokenizer_change(pieces, carried(tokenizer__model="one")) is None
    assert tokenizer_change(pieces, carried(tokenizer__json=bpe(ONE))) is None  # nobody knows


@pytest.mark.parametrize(
    ("ours", "base", "said"),
    [
        ({"eos_token": "<|end|>"}, {"eos_token": {"content": "</s>"}},
         "its tokenizer ends texts with <|end|>, and the base's with </s>"),
        ({"add_bos_token": False}, {"add_bos_token": True},
         "the base's tokenizer adds a token where it begins a text, and its own does not"),
        ({"add_bos_token": False}, {}, None),
        ({"pad_token": "x", "model_max_length": 5}, {"pad_token": "y"}, None),
    ],
)  # fmt: skip
def test_first_and_last_tokens(ours, base, said):
    ours, base = carried(tokenizer_config__json=ours), carried(tokenizer_config__json=base)
    assert tokenizer_change(ours, base) == said


def test_chat_templates():
    jinja, config = carried(chat_template__jinja="X\n"), carried(tokenizer_config__json={
        "chat_template": [{"name": "default", "template": "X"}, {"name": "tool", "template": "T"}]
    })  # fmt: skip
    assert template_change(jinja, config) is None
    assert template_change(carried(), config) is None
    assert template_change(config, jinja) == "has its own chat template tool, but its base has none"
    assert template_change(jinja, carried()) == "has its own chat template, but its base has none"
    other = carried(chat_template__json={"chat_template": "Y"})
    assert template_change(other, jinja) == "has another chat template than its base's"


@pytest.fixture
def with_tokenizer(adapter, tmp_path):
    """An adapter with the tokenizer of its base beside it."""
    folder = shutil.copytree(adapter("plain"), tmp_path / "adapter")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(SMALL_MODEL / name, folder / name)
    return folder


def rules(path, base):
    return {finding.rule for finding in check(path, base=base).findings} - {"FORMAT", "ROW_ORDER"}


def test_a_copy_of_the_base_s_is_no_finding_whatever_the_base_lies_in(
    with_tokenizer, base, tmp_path
):
    convert(base, tmp_path / "bundle")
    convert(base, tmp_path / "base.gguf")
    convert(with_tokenizer, tmp_path / "bundle" / "adapters" / "polite")
    for held in (base, tmp_path / "bundle", tmp_path / "base.gguf", base / "config.json"):
        assert rules(with_tokenizer, held) == set(), held
    assert rules(tmp_path / "bundle" / "adapters" / "polite", None) == set()
    (with_tokenizer / "chat_template.jinja").write_text("{{ messages }}")
    for held in (base, tmp_path / "bundle", tmp_path / "base.gguf"):
        assert rules(with_tokenizer, held) == {"CHAT_TEMPLATE_CHANGED"}, held
    assert rules(with_tokenizer, base / "config.json") == set()


def test_as_transformers_saves_it_again(with_tokenizer, base):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.save_pretrained(with_tokenizer)
    assert rules(with_tokenizer, base) == set()
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.add_tokens(["<|turn|>"])
    tokenizer.save_pretrained(with_tokenizer)
    assert rules(with_tokenizer, base) == {"CHAT_TEMPLATE_CHANGED", "TOKENIZER_CHANGED"}


def test_a_damaged_tokenizer_is_named(with_tokenizer, base):
    (with_tokenizer / "tokenizer.json").write_text('{"model": {}, }')
    with pytest.raises(InputError, match=r"adapter: tokenizer\.json is not JSON"):
        check(with_tokenizer, base=base)
