"""SmolLM2-135M-Instruct, Q4_1: what llama.cpp does with the file, transformers does with ours.

Measured: with the numbers of the file in float32 the two are 2e-4 apart in log-probability; on the
file itself llama.cpp rounds activations to 8 bits, which costs 0.005 nats of divergence; NF4 over
Q4_1 costs 0.4 to 1 nat, and is 2e-4 the same in both.
"""

from __future__ import annotations

import pytest
import torch
import transformers
from safetensors.torch import load_file

from loraformat.ops.convert.convert import convert
from tests.real.comparing import (
    apart,
    apply_template,
    by_llama_cpp,
    by_transformers,
    divergence,
    opened,
    tokenize,
    tokenizer_of,
)
from tests.real.nasty_lines import nasty_lines
from tests.real.real_models import smollm2

TEXTS = ["The capital of France is", "def fibonacci(n):\n    ", "<|im_start|>user\nHi<|im_end|>\n"]
CHATS = [
    [{"role": "user", "content": "Hello!"}],
    [{"role": "system", "content": "Be short. "}, {"role": "user", "content": "1+1?"},
     {"role": "assistant", "content": "2"}, {"role": "user", "content": " and\n2+2?"}],
]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The file as dense float32, as a bundle, and both as GGUF files again."""
    folder = tmp_path_factory.mktemp("smollm2")
    convert(smollm2(), folder / "dense", to_format="safetensors", dtype="f32")
    convert(folder / "dense", folder / "dense.gguf", dtype="f32")
    report = convert(smollm2(), folder / "bundle")
    assert any("became BF16" in note and "without a loss" in note for note in report.notes)
    convert(folder / "bundle", folder / "stored", to_format="safetensors", dtype="f32")
    convert(folder / "bundle", folder / "stored.gguf", dtype="f32")
    return folder


@pytest.fixture(scope="module")
def prompts(made):
    return [tokenizer_of(made / "dense")(text)["input_ids"] for text in TEXTS]


@pytest.fixture(scope="module")
def dense(made, prompts):
    return by_transformers(opened(made / "dense"), prompts)


def test_its_numbers_give_the_same_log_probabilities(made, prompts, dense):
    assert apart(dense, by_llama_cpp(made / "dense.gguf", prompts)) < 5e-4


def test_the_file_itself_differs_by_llama_cpp_s_own_rounding(prompts, dense):
    assert divergence(dense, by_llama_cpp(smollm2(), prompts)) < 0.02


def test_a_bundle_computes_the_same_in_both(made, prompts, dense):
    stored = by_transformers(opened(made / "stored"), prompts)
    assert apart(stored, by_llama_cpp(made / "stored.gguf", prompts)) < 5e-4
    assert 0.05 < divergence(dense, stored) < 1.5, "what NF4 costs after Q4_1"
    bundle = transformers.AutoModelForCausalLM.from_pretrained(made / "bundle").train()
    assert divergence(stored, by_transformers(bundle, prompts)) < 0.02, "in bfloat16"


def test_token_ids_are_those_of_llama_cpp(made):
    tokenizer = tokenizer_of(made / "dense")
    lines = nasty_lines(list(tokenizer.get_added_vocab()))
    assert len(set(lines)) > 280
    for special in (False, True):
        ours = [tokenizer(line, add_special_tokens=special)["input_ids"] for line in lines]
        for path in (smollm2(), made / "stored.gguf"):
            theirs = tokenize(path, lines, add_special=special)
            differ = [line for line, a, b in zip(lines, ours, theirs, strict=True) if a != b]
            assert not differ, (path.name, differ[:3])


def test_chat_template_and_special_tokens_survive_both_ways(made):
    wanted = apply_template(smollm2(), CHATS)
    assert apply_template(made / "stored.gguf", CHATS) == wanted
    for name in ("dense", "bundle", "stored"):
        tokenizer = tokenizer_of(made / name)
        prompts = [
            tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            for chat in CHATS
        ]
        assert prompts == wanted, name
        assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
        assert tokenizer.pad_token == "<|im_end|>"
        assert len(tokenizer) == 49152


def test_norms_that_were_trained_in_16_bits_are_exact_in_a_bundle(made):
    exact = load_file(made / "dense" / "model.safetensors")
    stored = load_file(next((made / "bundle").glob("*.safetensors")))
    norms = [name for name in exact if "norm" in name]
    assert len(norms) == 61
    for name in norms:
        assert stored[name].dtype == torch.bfloat16
        assert torch.equal(stored[name].float(), exact[name]), name
