"""Byte-level BPE: transformers, llama.cpp and the tokenizer made back give the same tokens."""

from __future__ import annotations

import pytest
from llama_runtime import tokenize
from loraformat_converters.gguf.container import open_gguf
from loraformat_converters.gguf.tokenizers.pre_tokenizers import TABLE, described
from made_tokenizers import TEXTS, ids, model_of, trained_bpe

from loraformat.ops.convert import convert

ROWS = 832


def compare(source, tmp_path, texts=TEXTS, *, special=False, **options):
    """Convert there and back; return the report after all ids were found equal."""
    report = convert(source, tmp_path / "model.gguf", dtype="f32", **options)
    convert(tmp_path / "model.gguf", tmp_path / "back", to_format="safetensors")
    theirs = ids(source, texts, special=special)
    assert any(theirs)
    ours = tokenize(tmp_path / "model.gguf", texts, add_special=special)
    for text, one, other in zip(texts, theirs, ours, strict=True):
        assert one == other, f"llama.cpp, {text!r}"
    back = ids(tmp_path / "back", texts, special=special)
    for text, one, other in zip(texts, theirs, back, strict=True):
        assert one == other, f"made back, {text!r}"
    return report


@pytest.mark.parametrize("pre", TABLE, ids=lambda pre: pre.names[0])
def test_every_pre_tokenizer(pre, tmp_path):
    tokenizer = trained_bpe(described(pre), ignore_merges=pre.ignore_merges)
    source = model_of(tmp_path / "source", tokenizer, rows=ROWS)
    compare(source, tmp_path)
    with open_gguf(tmp_path / "model.gguf") as file:
        assert file.text("tokenizer.ggml.pre") == pre.names[0]
