"""What the trainer writes, merged into the weights that it computed with, is the trained model."""

from __future__ import annotations

import pytest
import torch

from loraformat.families.table import family_of
from loraformat.ops.convert.convert import convert
from loraformat.ops.merge.merge import merge
from loraformat.train import LoraOptions, load
from tests.adapters import moe_models
from tests.laws.pairs import logits, opened, rounding
from tests.train import causal_models

MODELS = [
    "aria_text", "bert", "bloom", "deepseek_v3", "falcon", "gemma3_text", "gpt2", "gpt_oss",
    "granitemoe", "laguna", "llama", "llama4_text", "mamba", "mixtral", "opt", "phi3", "phimoe",
    "qwen2_moe", "zamba2",
]  # fmt: skip


@pytest.mark.parametrize("model_type", MODELS)
def test_a_trained_adapter_merged_gives_the_trained_model(model_type, tmp_path):
    zoo = moe_models if model_type in moe_models.model_types() else causal_models
    original = zoo.make(model_type)
    family = family_of(original.config.to_dict())
    original.save_pretrained(tmp_path / "original")
    convert(tmp_path / "original", tmp_path / "bundle")
    convert(tmp_path / "bundle", tmp_path / "dense", to_format="safetensors", dtype="f32")
    random = torch.Generator().manual_seed(0)
    with load(tmp_path / "bundle", lora=LoraOptions(rank=4, alpha=8)).eval() as model:
        before = logits(model)
        with torch.no_grad():
            for name, branch in model.branches.items():
                # Beside what its class reads by itself B gets no gradient, and stays zero.
                if name.rpartition(".")[2] not in family.read_leaves:
                    branch.b.copy_(torch.randn(branch.b.shape, generator=random) * 0.1)
        trained = logits(model)
        model.save_adapter(tmp_path / "adapter")
    merge(tmp_path / "dense", [tmp_path / "adapter"], tmp_path / "merged", to="safetensors")
    found = opened(tmp_path / "merged")
    bound = rounding(found, logits(found))
    assert bound < 0.01 * (trained - before).abs().max()
    torch.testing.assert_close(logits(found), trained, atol=bound, rtol=0)
