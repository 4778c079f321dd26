"""Byte-level BPE: transformers, llama.cpp and the tokenizer made back give the same tokens."""

from __future__ import annotations

import pytest
from loraformat_converters.gguf.container.reader import open_gguf
from loraformat_converters.gguf.tokenizers.pre_tokenizers import TABLE, described
from made_tokenizers import compare, model_of, trained_bpe

ROWS = 832


@pytest.mark.parametrize("pre", TABLE, ids=lambda pre: pre.names[0])
def test_every_pre_tokenizer(pre, tmp_path):
    tokenizer = trained_bpe(described(pre), ignore_merges=pre.ignore_merges)
    source = model_of(tmp_path / "source", tokenizer, rows=ROWS)
    compare(source, tmp_path)
    with open_gguf(tmp_path / "model.gguf") as file:
        assert file.text("tokenizer.ggml.pre") == pre.names[0]
