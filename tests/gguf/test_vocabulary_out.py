"""Adapters of another vocabulary to GGUF: llama.cpp has the tokens, and PEFT's probabilities."""

from __future__ import annotations

import json
import shutil

import peft
import pytest
import torch
import transformers
from bases import SMALL, apart, make_base, run, tolerance
from llama_runtime import log_probabilities, tokenize
from loraformat_converters.gguf.container.reader import open_gguf
from loraformat_converters.gguf.container.types import ValueType

from loraformat.errors import UnsupportedError
from loraformat.ops.convert.convert import convert
from loraformat.ops.merge.merge import merge

ROWS = 2048
TARGETS = {"llama": ["q_proj", "up_proj"], "gemma3_text": ["q_proj"], "gpt2": ["c_attn"],
           "qwen2": ["q_proj"]}  # fmt: skip


def with_tokens(rows: int) -> str:
    """The small model's tokenizer with new tokens up to a size."""
    parsed = json.loads((SMALL / "tokenizer.json").read_text())
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    parsed["added_tokens"] += [
        {"id": number, "content": f"<|new{number}|>", "special": True, **plain}
        for number in range(ROWS, rows)
    ]
    return json.dumps(parsed)


def adapted(name, path, rows, tokenizer=True, **options):
    """A base, an adapter made after a resize, and PEFT's model."""
    make_base(name, path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(
        path / "base", dtype=torch.float32, attn_implementation="eager"
    )
    base.resize_token_embeddings(rows)
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS[name], **options)
    wrapped = peft.get_peft_model(base, config).eval()
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    wrapped.save_pretrained(path / "adapter")
    if tokenizer:
        (path / "adapter" / "tokenizer.json").write_text(with_tokens(rows))
        shutil.copy(SMALL / "tokenizer_config.json", path / "adapter")
    return wrapped


SAVED = {"modules_to_save": ["embed_tokens", "lm_head"]}
CASES = {
    "saved": ("llama", SAVED),
    "tokens": ("llama", {"trainable_token_indices": {"embed_tokens": [2049, 2050]}}),
    "tied": ("gemma3_text", {}),
    "gpt2": ("gpt2", {"trainable_token_indices": {"wte": [2049, 2050]}}),
}


@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_has_the_tokens(case, tmp_path):
    name, options = CASES[case]
    rows = ROWS + 3
    model = adapted(name, tmp_path, rows, **options)
    merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged.gguf", dtype="f32")
    prompts = [[0, *range(40, 70)], [5, 2049, 2050, *range(300, 320), 2048]]
    found = list(log_probabilities(tmp_path / "merged.gguf", prompts))
    assert apart(run(model, name, prompts), found) < max(tolerance(name), 2e-5)
    text = "a <|new2049|> b"
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "adapter")
    wanted = tokenizer.encode(text, add_special_tokens=False)
    assert 2049 in wanted
    assert tokenize(tmp_path / "merged.gguf", [text]) == [wanted]


def test_fewer_tokens(tmp_path):
    """The tokens that are left out are not in the list, either."""
    model = adapted("llama", tmp_path, ROWS - 8, tokenizer=False, **SAVED)
    parsed = json.loads((SMALL / "tokenizer.json").read_text())
    vocabulary = {text: n for text, n in parsed["model"]["vocab"].items() if n < ROWS - 8}
    pairs = [
        pair if isinstance(pair, list) else pair.split(" ") for pair in parsed["model"]["merges"]
    ]
    parsed["model"] |= {
        "vocab": vocabulary,
        "merges": [pair for pair in pairs if "".join(pair) in vocabulary],
    }
    (tmp_path / "adapter" / "tokenizer.json").write_text(json.dumps(parsed))
    shutil.copy(SMALL / "tokenizer_config.json", tmp_path / "adapter")
    merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged.gguf", dtype="f32")
    prompts = [[0, *range(40, 70)]]
    found = list(log_probabilities(tmp_path / "merged.gguf", prompts))
    assert apart(run(model, "llama", prompts), found) < 2e-5
    with open_gguf(tmp_path / "merged.gguf") as file:
        assert len(file.array("tokenizer.ggml.tokens", ValueType.STRING)) == ROWS - 8


def test_a_gguf_base_grows(tmp_path):
    model = adapted("llama", tmp_path, ROWS + 3, **SAVED)
    convert(tmp_path / "base", tmp_path / "base.gguf", dtype="f32")
    merge(tmp_path / "base.gguf", [tmp_path / "adapter"], tmp_path / "merged.gguf", dtype="f32")
    prompts = [[0, *range(40, 70), 2050]]
    found = list(log_probabilities(tmp_path / "merged.gguf", prompts))
    assert apart(run(model, "llama", prompts), found) < 2e-5


def test_without_a_tokenizer_of_its_own(tmp_path):
    """New tokens have no text then, and a note says so; a tokenizer of more tokens is refused."""
    model = adapted("llama", tmp_path, ROWS + 3, tokenizer=False, **SAVED)
    report = merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged.gguf", dtype="f32")
    assert any("the adapter has no tokenizer" in note for note in report.notes)
    prompts = [[0, *range(40, 70), 2050]]
    found = list(log_probabilities(tmp_path / "merged.gguf", prompts))
    assert apart(run(model, "llama", prompts), found) < 2e-5


@pytest.mark.parametrize("options", [SAVED, {"trainable_token_indices": {"embed_tokens": [2049]}}])
def test_llama_cpp_lora_cannot_grow(tmp_path, options):
    """Refused, and the remedy that is named works."""
    adapted("llama", tmp_path, ROWS + 3, **options)
    with pytest.raises(UnsupportedError, match="low-rank deltas only") as refused:
        convert(tmp_path / "adapter", tmp_path / "lora.gguf", base=tmp_path / "base")
    assert refused.value.hint == "merge it: loraformat merge BASE ADAPTER -o merged.gguf"
    assert not (tmp_path / "lora.gguf").exists()
    merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged.gguf")


def test_deltas_of_another_vocabulary_are_no_gguf_adapter(tmp_path):
    adapted("llama", tmp_path, ROWS + 3)
    shutil.rmtree(tmp_path / "adapter")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(ROWS + 3)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    wrapped = peft.get_peft_model(base, config)
    wrapped.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    with pytest.raises(UnsupportedError, match="2051 tokens") as refused:
        convert(tmp_path / "adapter", tmp_path / "lora.gguf", base=tmp_path / "base")
    assert "-o merged.gguf" in refused.value.hint
    merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged.gguf")
