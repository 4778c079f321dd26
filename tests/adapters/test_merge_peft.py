"""Merging gives the weights that PEFT's merge_and_unload gives, where that is right."""

import itertools
from importlib import import_module
from pathlib import Path

import pytest
import torch

from loraformat.model.adapter import Adapter, LoraDelta
from loraformat.ops.merge.merge import merge
from loraformat.testing import dense

peft = import_module("peft")

SIZES = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(**SIZES, intermediate_size=48, num_key_value_heads=2, tie_word_embeddings=False)
    )


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=16)
    )


def mixtral():
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(
        MixtralConfig(**SIZES, intermediate_size=24, num_key_value_heads=2, num_local_experts=3)
    )


CASES = {
    "llama": (llama, {"target_modules": "all-linear"}),
    "rslora": (llama, {"target_modules": ["q_proj", "up_proj"], "use_rslora": True}),
    "dora": (llama, {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    "bias": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "gpt2": (gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "gpt2 dora": (gpt2, {"target_modules": ["c_fc"], "fan_in_fan_out": True, "use_dora": True}),
    "embedding": (llama, {"target_modules": ["embed_tokens", "k_proj"]}),
}


@pytest.mark.parametrize("case", CASES)
def test_as_peft_merges(tmp_path, case):
    make, options = CASES[case]
    wrapped = trained(make, options, tmp_path)
    wrapped.save_pretrained(tmp_path / "adapter")
    report = merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")
    assert report.merged
    compare(wrapped, tmp_path / "out")


def trained(make, options, tmp_path):
    """A model whose adapter is no longer zero; its base is saved."""
    torch.manual_seed(0)
    model = make()
    model.save_pretrained(tmp_path / "base")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=10, **options))
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    return wrapped


def compare(wrapped, path):
    model = wrapped.merge_and_unload()
    merged, again = model.state_dict(), type(model).from_pretrained(path).state_dict()
    assert again.keys() == merged.keys()
    for name, wanted in merged.items():
        torch.testing.assert_close(again[name], wanted, atol=2e-6, rtol=1e-5, msg=name)


def test_fused_experts_as_peft_merges_them(tmp_path):
    names = {"base_layer.": "gate_up_proj", "": "down_proj"}
    options = {
        "target_modules": [],
        "target_parameters": [f"mlp.experts.{n}" for n in names.values()],
    }
    wrapped = trained(mixtral, options, tmp_path)
    state = peft.get_peft_model_state_dict(wrapped)
    deltas = {}
    for layer, (nesting, name) in itertools.product(range(2), names.items()):
        module = f"model.layers.{layer}.mlp.experts."
        a = state[f"base_model.model.{module}{nesting}lora_A.weight"]
        b = state[f"base_model.model.{module}{nesting}lora_B.weight"]
        a = a.reshape(3, 4, -1)  # expert-major, while B is expert-minor
        b = b.reshape(len(b), 4, 3).permute(2, 0, 1)
        deltas[module + name] = LoraDelta(module + name, dense("a", a), dense("b", b), 10 / 4)
    merge(tmp_path / "base", [Adapter(Path("memory"), "peft", deltas)], tmp_path / "out")
    compare(wrapped, tmp_path / "out")
