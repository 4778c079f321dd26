"""Each architecture with a tokenizer of its own kind: tokens and numbers, out and in."""

from __future__ import annotations

import json

import pytest
from bases import apart, by_llama_cpp, by_transformers, make_model, tolerance
from llama_runtime import tokenize
from made_spm import add, tokenizer_json, trained, write
from made_tokenizers import TEXTS, ids
from test_tokenizers_wordpiece import CONFIG
from test_tokenizers_wordpiece import trained as wordpiece
from tokenizers import Tokenizer

from loraformat.ops.convert.convert import convert

#: As the models' own tokenizer_config.json say.
LLAMA = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>",
         "unk_token": "<unk>", "add_bos_token": True, "add_eos_token": False,
         "legacy": True}  # fmt: skip
GEMMA = {**LLAMA, "tokenizer_class": "GemmaTokenizer", "bos_token": "<bos>",
         "eos_token": "<eos>"}  # fmt: skip
KINDS = {
    "llama": LLAMA, "mistral": LLAMA, "mixtral": LLAMA, "phi3": LLAMA, "gemma2": GEMMA,
    "gemma3_text": GEMMA, "gemma3": GEMMA,
    "bert": {**CONFIG, "tokenizer_class": "BertTokenizer", "do_lower_case": True},
}  # fmt: skip


def with_tokenizer(name, directory):
    make_model(name, directory)
    if name == "bert":
        wordpiece().save(str(directory / "tokenizer.json"))
    else:
        tokenizer = tokenizer_json(trained("gemma" if "gemma" in name else "llama"))
        write(directory, add(tokenizer, "<|start|>", "<|end|>"))
    (directory / "tokenizer_config.json").write_text(json.dumps(KINDS[name]))
    return directory


@pytest.mark.parametrize("name", KINDS)
def test_tokens_and_numbers(name, tmp_path):
    source = with_tokenizer(name, tmp_path / "source")
    report = convert(source, tmp_path / "model.gguf", dtype="f32")
    convert(tmp_path / "model.gguf", tmp_path / "back", to_format="safetensors")
    texts = [text for text in TEXTS if name != "bert" or "नमस्ते" not in text]
    file = Tokenizer.from_file(str(source / "tokenizer.json"))
    theirs = [file.encode(text).ids for text in texts]
    assert tokenize(tmp_path / "model.gguf", texts, add_special=True) == theirs
    assert ids(tmp_path / "back", texts, special=True) == theirs
    if name != "llama":
        assert ids(source, texts, special=True) == theirs
    else:  # LlamaTokenizer of transformers 5 makes a normalizer of its own, and we say so
        assert any("transformers 5" in note for note in report.notes)
        plain = [n for n, text in enumerate(texts) if text[:1].strip() and "<|" not in text]
        auto = ids(source, [texts[n] for n in plain], special=True)
        assert auto == [theirs[n] for n in plain]
    numbers = by_transformers(source, name)
    assert apart(by_llama_cpp(tmp_path / "model.gguf", name), numbers) < tolerance(name)
    back = "gemma3_text" if name == "gemma3" else name
    assert apart(by_transformers(tmp_path / "back", back), numbers) < tolerance(name)
