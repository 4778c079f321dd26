"""Tokenizers as real models have them: a vocabulary alone, and files that disagree."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest
from llama_runtime import tokenize
from made_tokenizers import TEXTS, ids, level, model_of, trained_bpe
from test_tokenizers_wordpiece import trained as wordpiece
from tokenizers import Tokenizer, processors

from loraformat.errors import InputError, UnsupportedError
from loraformat.ops.convert.convert import convert

GPT2 = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<|start|>", "eos_token": "<|end|>",
        "unk_token": "<|end|>"}  # fmt: skip
QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def definition(use_regex: bool) -> dict:
    return json.loads(level(use_regex).__getstate__())


def with_pair(directory: Path, config: dict | None = None) -> Path:
    """Write a model whose tokenizer is vocab.json with merges.txt, as GPT-2's is."""
    tokenizer = trained_bpe(definition(True))
    rows = tokenizer.get_vocab_size()
    model_of(directory, None, config or GPT2, rows=rows)
    raw = json.loads(tokenizer.to_str())
    (directory / "vocab.json").write_text(json.dumps(tokenizer.get_vocab()))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in raw["model"]["merges"])]
    (directory / "merges.txt").write_text("\n".join(lines) + "\n")
    return directory


def test_vocabulary_and_merges_are_the_tokenizer_that_transformers_makes(tmp_path):
    source = with_pair(tmp_path / "source")
    convert(source, tmp_path / "model.gguf", dtype="f32")
    assert tokenize(tmp_path / "model.gguf", TEXTS, add_special=True) == ids(source, special=True)


def test_through_a_bundle_they_are_the_same(tmp_path):
    source = with_pair(tmp_path / "source")
    convert(source, tmp_path / "bundle")
    convert(tmp_path / "bundle", tmp_path / "model.gguf", dtype="f32")
    assert tokenize(tmp_path / "model.gguf", TEXTS) == ids(source)


def test_no_code_of_the_model_is_run(tmp_path):
    remote = {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}}
    source = with_pair(tmp_path / "source", GPT2 | remote)
    (source / "evil.py").write_text("raise SystemExit('remote code was run')")
    convert(source, tmp_path / "model.gguf", dtype="f32")
    (source / "tokenizer_config.json").write_text(json.dumps(GPT2))
    assert tokenize(tmp_path / "model.gguf", TEXTS) == ids(source)


def test_a_vocabulary_of_wordpiece(tmp_path):
    tokenizer = wordpiece()
    config = {"tokenizer_class": "BertTokenizer", "do_lower_case": True}
    source = model_of(
        tmp_path / "source", None, config, rows=tokenizer.get_vocab_size(), kind="bert"
    )
    tokens = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    (source / "vocab.txt").write_text("".join(f"{text}\n" for text, _ in tokens))
    convert(source, tmp_path / "model.gguf", dtype="f32")
    texts = [text for text in TEXTS if "नमस्ते" not in text]
    assert tokenize(tmp_path / "model.gguf", texts, add_special=True) == ids(
        source, texts, special=True
    )


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("vocab.json", "{"),
        ("vocab.json", "[]"),
        ("vocab.json", '{"a": "b"}'),
        ("merges.txt", "qzx xzq"),
    ],
)
def test_a_damaged_vocabulary_is_named(tmp_path, file, text):
    source = with_pair(tmp_path / "source")
    (source / file).write_text(text)
    with pytest.raises(InputError, match=r"vocab\.json, merges\.txt|tokenizer\.json"):
        convert(source, tmp_path / "model.gguf", dtype="f32")


def test_half_a_vocabulary_is_none(tmp_path):
    source = with_pair(tmp_path / "source")
    (source / "merges.txt").unlink()
    with pytest.raises(UnsupportedError, match=r"no vocab\.json with merges\.txt"):
        convert(source, tmp_path / "model.gguf", dtype="f32")


def like_qwen() -> Tokenizer:
    split = {"type": "Split", "pattern": {"Regex": QWEN}, "behavior": "Isolated", "invert": False}
    tokenizer = trained_bpe({"type": "Sequence", "pretokenizers": [split, definition(False)]})
    raw = json.loads(tokenizer.to_str())
    raw["normalizer"] = {"type": "NFC"}
    vocabulary = raw["model"]["vocab"]
    vocabulary["</s>"] = vocabulary.pop(max(vocabulary, key=vocabulary.get), None)
    raw["model"]["merges"] = [
        pair for pair in raw["model"]["merges"] if "".join(pair) in vocabulary
    ]
    return Tokenizer.from_str(json.dumps(raw))


def test_normalization_that_llama_cpp_does_not_do_is_said(tmp_path):
    tokenizer = like_qwen()
    rows = max(tokenizer.get_vocab().values()) + 1
    source = model_of(tmp_path / "source", tokenizer, rows=rows)
    report = convert(source, tmp_path / "model.gguf", dtype="f32")
    assert any("NFC" in note for note in report.notes)
    assert any("</s>" in note and "control token" in note for note in report.notes)
    composed = [text for text in TEXTS if unicodedata.is_normalized("NFC", text)]
    assert tokenize(tmp_path / "model.gguf", composed) == ids(source, composed)
    apart = unicodedata.normalize("NFD", "café")
    assert tokenize(tmp_path / "model.gguf", [apart]) != ids(source, [apart])


@pytest.mark.parametrize("adds", [True, False])
def test_first_tokens_on_which_the_files_disagree_are_said(tmp_path, adds):
    """DeepSeek's config says add_bos_token, and its post-processor adds none."""
    tokenizer = trained_bpe(definition(True))
    start = tokenizer.token_to_id("<|start|>")
    tokenizer.post_processor = (
        processors.ByteLevel(trim_offsets=False)
        if adds
        else processors.TemplateProcessing(
            single="<|start|> $A", special_tokens=[("<|start|>", start)]
        )
    )
    config = {"bos_token": "<|start|>", "add_bos_token": adds, "add_eos_token": False}
    rows = tokenizer.get_vocab_size()
    source = model_of(tmp_path / "source", tokenizer, config, rows=rows)
    report = convert(source, tmp_path / "model.gguf", dtype="f32")
    (note,) = [note for note in report.notes if "add_bos_token" in note]
    words = (
        ("puts <|start|> before", "puts nothing") if adds else ("puts nothing before", "puts <|s")
    )
    assert all(word in note for word in words)
    (ours,) = tokenize(tmp_path / "model.gguf", ["some words"], add_special=True)
    (theirs,) = ids(source, ["some words"], special=True)
    assert (ours[0] == start, theirs[0] == start) == (adds, not adds)
    assert ours[adds:] == theirs[not adds :]


def test_files_that_agree_have_no_note(tmp_path):
    tokenizer = trained_bpe(definition(True))
    source = model_of(tmp_path / "source", tokenizer, rows=tokenizer.get_vocab_size())
    assert convert(source, tmp_path / "model.gguf", dtype="f32").notes == []
