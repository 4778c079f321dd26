"""Laws that hold for every mixture of experts that transformers has, across verbs and in PEFT."""

import warnings

import peft
import pytest
import torch
import transformers

from loraformat.ops.extract.extract import ExtractOptions, extract
from loraformat.ops.merge.merge import merge
from loraformat.ops.reduce import Reduction, reduce
from tests.adapters import moe_models

#: Ways of storing experts that no adapter's names lead to.
NOT_NAMED = {"inkling2_text"}
RANK = 2


def tune(model):
    """Add a delta of low rank to every matrix of the layers, experts and routers included."""
    random = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".layers." not in name or weight.ndim not in (2, 3) or "conv" in name:
                continue
            if weight.ndim == 2 and not name.endswith(".weight"):
                continue
            b = torch.randn(*weight.shape[:-1], RANK, generator=random)
            a = torch.randn(*weight.shape[:-2], RANK, weight.shape[-1], generator=random)
            weight += 0.02 * b @ a
    return model


def opened(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    ).eval()


def in_peft(base, adapter):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        return moe_models.logits(peft.PeftModel.from_pretrained(opened(base), adapter))


SQUARE = [
    pytest.param(one, {"intermediate_size": 32}, id=f"{one}-square")
    for one in ("aria_text", "gpt_oss", "llama4_text", "mixtral")
]


@pytest.mark.parametrize(
    ("model_type", "sizes"),
    [*(pytest.param(one, {}, id=one) for one in moe_models.model_types()), *SQUARE],
)
def test_an_extracted_adapter_gives_the_fine_tune_back(model_type, sizes, tmp_path):
    """And so does the same adapter reduced at full rank. Square experts hide no transposition."""
    base, tuned, adapter = tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter"
    model = moe_models.make(model_type, **sizes)
    before = moe_models.logits(model)
    model.save_pretrained(base)
    wanted = moe_models.logits(tune(model))
    assert (wanted - before).abs().max() > 0.05
    model.save_pretrained(tuned)
    extract(base, tuned, adapter, ExtractOptions(rank=8))
    merge(base, [adapter], tmp_path / "merged", to_format="safetensors")
    reduce(adapter, tmp_path / "reduced", Reduction(rank=8), base=base)
    torch.testing.assert_close(
        moe_models.logits(opened(tmp_path / "merged")), wanted, atol=1e-3, rtol=0
    )
    if model_type not in NOT_NAMED:
        for one in (adapter, tmp_path / "reduced"):
            torch.testing.assert_close(in_peft(base, one), wanted, atol=1e-3, rtol=0)
