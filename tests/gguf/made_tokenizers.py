"""Small tokenizers of every kind, trained on the text of this repository, and a model for each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from llama_runtime import tokenize
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

import loraformat
from loraformat.ops.convert.convert import convert
from tests.tiny_models import build, resized

#: Code, numbers, runs of white space, other scripts, emoji, specials, nothing.
TEXTS = [
    "Hello world, it's the year 2024; I'll say we've 1234567 reasons.",
    "def f(x: int) -> list[str]:\n    return [f'{x!r}' for _ in range(10)]  # TODO\n\n\n\tpass\r\n",
    "  leading and   many    spaces\t\ttabs \n \n  \n\nand trailing   ",
    "naïve café über straße ÀÉÎÕÜ Ωμέγα привет мир",
    "你好，世界。今日は東京 안녕하세요 नमस्ते สวัสดี",
    "emoji 👩‍👩‍👧‍👦 🏳️‍🌈 🚀🚀 ©®™ ½ ² ٣٤٥ …— “quoted”",
    "<|start|>user<|end|> and <tool> x<|end|>",
    "camelCase HTTPServer snake_case 3.14e-10 0xFF a/b/c //// !!! ??? I'LL DON'T we'Ve",
    " ",
    "\n",
    "a",
    "",
]
ADDED = ["<|start|>", "<|end|>"]
CORPUS = [
    path.read_text() for path in sorted(Path(loraformat.__file__).parent.rglob("*.py"))[:12]
] + TEXTS * 3


def level(use_regex: bool) -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def trained_bpe(definition: dict[str, Any], *, ignore_merges: bool = False) -> Tokenizer:
    """Train a byte-level BPE whose pre-tokenizer is so defined."""
    raw = json.loads(Tokenizer(models.BPE(ignore_merges=ignore_merges)).to_str())
    raw["pre_tokenizer"] = definition
    tokenizer = Tokenizer.from_str(json.dumps(raw))
    trainer = trainers.BpeTrainer(
        vocab_size=800, special_tokens=ADDED, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens(["<tool>"])
    return tokenizer


def model_of(
    directory: Path, tokenizer: Tokenizer | None, config: dict[str, Any] | None = None,
    *, rows: int, kind: str = "llama",
) -> Path:  # fmt: skip
    """Write the smallest model of a kind with that many tokens, and its tokenizer beside it."""
    values = resized(kind, vocab_size=rows, num_hidden_layers=1, n_layer=1)
    build(kind, values).save_pretrained(directory)
    if tokenizer is not None:
        tokenizer.save(str(directory / "tokenizer.json"))
    values = {"tokenizer_class": "PreTrainedTokenizerFast", **(config or {})}
    (directory / "tokenizer_config.json").write_text(json.dumps(values))
    return directory


def ids(path: Path, texts=TEXTS, *, special: bool = False) -> list[list[int]]:
    """Return what transformers' AutoTokenizer makes of texts."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    return [tokenizer(text, add_special_tokens=special)["input_ids"] for text in texts]


def compare(source: Path, scratch: Path, texts=TEXTS, *, special=False, **options) -> Any:
    """Convert there and back; return the report after all ids were found equal."""
    scratch.mkdir(exist_ok=True)
    report = convert(source, scratch / "model.gguf", dtype="f32", **options)
    convert(scratch / "model.gguf", scratch / "back", to_format="safetensors")
    theirs = ids(source, texts, special=special)
    assert any(theirs)
    ours = tokenize(scratch / "model.gguf", texts, add_special=special)
    for text, one, other in zip(texts, theirs, ours, strict=True):
        assert one == other, f"llama.cpp, {text!r}"
    back = ids(scratch / "back", texts, special=special)
    for text, one, other in zip(texts, theirs, back, strict=True):
        assert one == other, f"made back, {text!r}"
    return report


torch.set_num_threads(1)
