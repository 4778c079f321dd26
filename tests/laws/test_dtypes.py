"""Laws of tensors of 16 bits: what merging writes is the fine-tune, but for one rounding."""

from __future__ import annotations

import pytest
import torch

from loraformat.ops.extract.extract import extract
from loraformat.ops.merge.merge import merge
from tests.adapters import moe_models
from tests.laws.pairs import stored, tune
from tests.train import causal_models

#: Linears, `Conv1D`, fused linears and experts in every layout that checkpoints have.
MODELS = [
    "aria_text", "bert", "gemma3_text", "gpt2", "gpt_oss", "granitemoe", "llama", "llama4_text",
    "mixtral", "phi3", "qwen2_moe",
]  # fmt: skip
#: More than any matrix here has: rounding to 16 bits makes a difference of full rank.
FULL_RANK = 128


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
@pytest.mark.parametrize("model_type", MODELS)
def test_extract_then_merge_gives_every_weight_of_the_fine_tune_back(model_type, dtype, tmp_path):
    """A weight is b + D, and D is off by what float32 factors lose, e.

    The fine-tune's weight is a number of 16 bits. So is what is rounded from it plus e: it is
    the same one, unless e is above half a unit in its last place, and then off by at most 2 e.
    """
    zoo = moe_models if model_type in moe_models.model_types() else causal_models
    model = zoo.make(model_type)
    model.to(dtype).save_pretrained(tmp_path / "base")
    tune(model.float()).to(dtype).save_pretrained(tmp_path / "tuned")
    paths = (tmp_path / name for name in ("base", "tuned", "adapter"))
    extract(*paths, rank=FULL_RANK, dtype="f32")
    merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged", to="safetensors")
    base, tuned, merged = (stored(tmp_path / one) for one in ("base", "tuned", "merged"))
    assert merged.keys() == tuned.keys()
    changed = 0
    for name, wanted in tuned.items():
        assert merged[name].dtype == wanted.dtype == dtype
        difference = wanted.double() - base[name].double()
        changed += bool(difference.any())
        # A product of as many terms as the rank; each factor rounded once.
        lost = FULL_RANK * torch.finfo(torch.float32).eps * difference.abs().max()
        assert (merged[name].double() - wanted.double()).abs().max() <= 2 * lost, name
    assert changed > 6
