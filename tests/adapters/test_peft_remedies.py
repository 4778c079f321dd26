"""What a refusal of another method advises is done, in PEFT, and leads to a LoRA or a model."""

import pytest
import torch
from loraformat_converters.peft import refusals
from peft import (
    LoraConfig,
    PeftModel,
    PeftType,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, MontecloraConfig
from transformers import LlamaConfig, LlamaForCausalLM

from loraformat.errors import UnsupportedError
from loraformat.ops.extract.extract import extract
from loraformat.ops.merge.merge import merge
from loraformat.ops.opening.adapter import open_adapter

IDS = torch.arange(20)[None]
TARGETS = {"target_modules": ["q_proj", "v_proj"]}
TOKENS = {"num_virtual_tokens": 4, "task_type": "CAUSAL_LM"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch.manual_seed(0)
    sizes = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, vocab_size=256,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(sizes).save_pretrained(path)
    return path


def opened(path):
    return LlamaForCausalLM.from_pretrained(path).eval()


def trained(base, path, config):
    """Save an adapter as after a training; return its logits."""
    model = get_peft_model(opened(base), config)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            parameter.data += 0.05 * torch.randn_like(parameter)
            assert "base_layer" not in name
    model.eval()
    model.save_pretrained(path)
    return model(IDS).logits


def refusal(path):
    with pytest.raises(UnsupportedError) as refused:
        open_adapter(path)
    return refused.value.hint


def follow(hint, base, path, wanted, tmp_path):
    """Do what a hint says; the result computes as the adapter did."""
    model = PeftModel.from_pretrained(opened(base), path)
    assert "PeftModel.from_pretrained(base, ADAPTER).merge_and_unload().save_pretrained" in hint
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    found = opened(tmp_path / "merged")(IDS).logits
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
    assert "loraformat extract BASE MERGED" in hint
    extract(base, tmp_path / "merged", tmp_path / "lora")
    merge(base, [tmp_path / "lora"], tmp_path / "again")
    torch.testing.assert_close(opened(tmp_path / "again")(IDS).logits, wanted, atol=1e-3, rtol=0)


#: Methods that change weights, with what their configs need beside target modules.
METHODS = {
    "ADALORA": {"total_step": 10}, "BOFT": {"boft_block_size": 4}, "C3A": {"block_size": 16},
    "FOURIERFT": {}, "HRA": {}, "IA3": {"feedforward_modules": []}, "LOHA": {}, "LOKR": {},
    "MISS": {}, "OFT": {}, "RANDLORA": {}, "ROAD": {}, "SHIRA": {}, "VERA": {},
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_methods_that_change_weights(base, tmp_path, method):
    config = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(method)](**TARGETS, **METHODS[method])
    wanted = trained(base, tmp_path / "adapter", config)
    follow(refusal(tmp_path / "adapter"), base, tmp_path / "adapter", wanted, tmp_path)


@pytest.mark.parametrize("config", [PromptTuningConfig, PromptEncoderConfig, PrefixTuningConfig])
def test_methods_that_add_tokens(base, tmp_path, config):
    trained(base, tmp_path / "adapter", config(**TOKENS))
    assert refusal(tmp_path / "adapter") == "use it in PEFT, unmerged: it does not change weights"
    PeftModel.from_pretrained(opened(base), tmp_path / "adapter")(IDS)


#: LoRA with a field that a low-rank delta does not hold.
VARIANTS = {
    "kasa": {"kasa_config": KasaConfig()},
    "bdlora": {"use_bdlora": BdLoraConfig(target_modules_bd_a=["q_proj", "v_proj"], nblocks=2)},
    "monteclora": {"monteclora_config": MontecloraConfig()},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_lora(base, tmp_path, variant):
    config = LoraConfig(r=4, lora_alpha=4, **TARGETS, **VARIANTS[variant])
    wanted = trained(base, tmp_path / "adapter", config)
    follow(refusal(tmp_path / "adapter"), base, tmp_path / "adapter", wanted, tmp_path)


def test_the_table_names_methods_of_peft():
    known = {kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING}
    assert known >= refusals._NOT_MERGED
