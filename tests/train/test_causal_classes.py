"""Classes in which training was wrong, or refused for no reason; `make real` tries them all."""

import peft
import pytest
import torch

from loraformat.errors import UnsupportedError, UsageError
from loraformat.ops.check.check import check
from loraformat.ops.merge.merge import merge
from loraformat.train import LoraOptions, load
from tests.adapters.moe_models import logits
from tests.train import causal_models
from tests.train.peft_gradients import (
    assert_refused,
    assert_trained_as_in_peft,
    bases,
    dense_model,
    made_in_peft,
)


@pytest.mark.parametrize(
    "model_type",
    ["bailing_hybrid", "inkling_text", "kimi_linear", "modernbert-decoder", "olmo_hybrid", "zamba",
     "zamba2"],
)  # fmt: skip
def test_loss_and_gradients_are_those_of_peft(model_type, tmp_path):
    assert_trained_as_in_peft(model_type, tmp_path)


@pytest.mark.parametrize("model_type", ["blt", "hrm_text", "prophetnet", "reformer", "roberta"])
def test_it_is_refused_before_anything_is_written(model_type, tmp_path):
    assert_refused(model_type, tmp_path)


@pytest.fixture(scope="module")
def zamba2(tmp_path_factory):
    """A model whose layers share a block: its bundle."""
    return bases(tmp_path_factory.mktemp("zamba2"), causal_models.make("zamba2"))


def test_weights_of_several_layers_are_left_out_of_all_linears(zamba2):
    with load(zamba2, lora=LoraOptions(rank=2)) as model:
        assert not [name for name in model.branches if "shared_transformer" in name]
        assert len(model.branches) == 8


def test_a_target_that_several_layers_share_is_refused(zamba2):
    with pytest.raises(UsageError, match=r"q_proj shares its weight .* all-linear does"):
        load(zamba2, lora=LoraOptions(rank=2, targets=("q_proj",)))


def test_an_adapter_of_a_shared_weight_is_refused(zamba2, tmp_path):
    dense = zamba2.parent / "dense"
    target = r".*layers\.1\.shared_transformer.*q_proj"
    made_in_peft(dense_model(dense), tmp_path / "theirs", target_modules=target)
    for use in (
        lambda: load(zamba2, adapter=tmp_path / "theirs"),
        lambda: merge(dense, [tmp_path / "theirs"], tmp_path / "merged"),
    ):
        with pytest.raises(UnsupportedError, match="a weight shared by several layers") as refused:
            use()
        assert "in PEFT" in refused.value.hint
    assert not (tmp_path / "merged").exists()


def test_an_adapter_of_a_shared_weight_is_nowhere_called_right(zamba2, tmp_path):
    """PEFT computes with it as long as nobody merges it: the warning says just that."""
    dense = zamba2.parent / "dense"
    target = r".*layers\.1\.shared_transformer.*q_proj"
    model = made_in_peft(dense_model(dense), tmp_path / "theirs", target_modules=target)
    wanted = logits(model)
    again = peft.PeftModel.from_pretrained(dense_model(dense), tmp_path / "theirs")
    torch.testing.assert_close(logits(again), wanted)
    assert (logits(again.merge_and_unload()) - wanted).abs().max() > 1e-3
    report = check(tmp_path / "theirs", base=dense)
    found = {one.runtime: one.level for one in report.findings if one.rule == "SHARED_BLOCK"}
    assert found == {
        **dict.fromkeys(("transformers", "vllm", "sglang", "lorax", "mlx"), "warn"),
        **dict.fromkeys(("llama.cpp", "ollama"), "fail"),
    }
    assert "right" not in report.verdicts.values()
    other = check(tmp_path / "theirs", base=dense, runtime=["transformers"])
    assert [one.rule for one in other.findings] == ["SHARED_BLOCK"]
    assert "without merge_and_unload" in other.findings[0].remedy


def test_an_adapter_that_leaves_shared_weights_out_is_merged_as_peft_has_it(zamba2, tmp_path):
    dense = zamba2.parent / "dense"
    model = made_in_peft(dense_model(dense), tmp_path / "theirs", target_modules=["linear"])
    merge(dense, [tmp_path / "theirs"], tmp_path / "merged")
    found, wanted = logits(dense_model(tmp_path / "merged")), logits(model)
    assert (wanted - logits(dense_model(dense))).abs().max() > 0.01
    assert (found - wanted).abs().max() < 1e-4
