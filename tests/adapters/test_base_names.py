"""Names of modules: on disk, in transformers' memory, and in adapters, class by class.

Each model is saved by transformers, which turns its renaming and fusing round, and adapted by PEFT:
the adapter has the names of memory, the checkpoint those of its family's files. PEFT's own
computation is what the merge must give.
"""

from __future__ import annotations

import re

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from loraformat.errors import UnsupportedError
from loraformat.model.base_names import BaseNames, names_of
from loraformat.model.base_names.resolver import _AS_STORED
from loraformat.ops.check.check import check
from loraformat.ops.convert.convert import convert
from loraformat.ops.merge.merge import merge
from loraformat.ops.opening.adapter import open_adapter
from loraformat.ops.opening.model import open_model
from tests.adapters import moe_models

SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 128, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
VISION = {
    "image_size": 32, "patch_size": 16, "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip
#: Models without experts of which transformers renames, cuts or joins tensors as it loads them.
OTHERS = {
    "hrm_text": {},
    "olmo_hybrid": {
        "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 16,
        "linear_value_head_dim": 16, "layer_types": ["linear_attention", "full_attention"],
    },
    "llava": {
        "vision_config": {"model_type": "clip_vision_model", **VISION},
        "text_config": {"model_type": "llama", **SIZES}, "image_token_index": 90,
    },
    "gemma3": {
        "vision_config": {**VISION, "vision_use_head": False}, "mm_tokens_per_image": 4,
        "text_config": {"model_type": "gemma3_text", "head_dim": 16, **SIZES},
        "image_token_index": 90, "boi_token_index": 91, "eoi_token_index": 92,
    },
    "kimi_k25": {
        "vision_config": {**VISION, "pos_emb_height": 4, "pos_emb_width": 4, "pos_emb_time": 1},
        "image_token_id": 90, "video_token_id": 91, "projection_hidden_size": 32,
        "vision_start_token_id": 92, "vision_end_token_id": 93, "tie_word_embeddings": False,
    },
}  # fmt: skip
EXPERTS = ["hunyuan_v1_moe", "granitemoe", "deepseek_v4", "kimi_linear", "phimoe", "mixtral"]
#: What PEFT does not adapt: it is no linear but in name.
LEFT_OUT = ("o_a_proj", ".router", "lm_head")


def make(kind: str):
    """Return a small random model, and the class that opens it again."""
    if kind in EXPERTS:
        return moe_models.make(kind), transformers.AutoModelForCausalLM
    values = OTHERS[kind]
    if kind == "kimi_k25":
        values = values | {"text_config": moe_models.config_of("deepseek_v3").to_dict()}
    wrapped = "text_config" in values
    config = transformers.AutoConfig.for_model(kind, **values if wrapped else SIZES | values)
    name = "AutoModelForImageTextToText" if wrapped else "AutoModelForCausalLM"
    opener = getattr(transformers, name)
    torch.manual_seed(0)
    model = opener.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.05)
    return model, opener


def opened(opener, path):
    return opener.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    ).eval()


def adapted(model):
    """Return a model with a random adapter of all its language model's linears and experts."""
    linears = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and not name.endswith(LEFT_OUT)
        and not re.search(r"vision|projector", name)
    ]
    experts = {".".join(n.split(".")[-2:]) for n, p in model.named_parameters()
               if p.ndim == 3 and "experts" in n}  # fmt: skip
    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=4, lora_alpha=8, task_type="CAUSAL_LM", target_modules=linears,
        target_parameters=sorted(experts) or None, init_lora_weights=False,
    )  # fmt: skip
    return peft.get_peft_model(model, config).eval()


def apart(one, other) -> float:
    return (one - other).abs().max().item()


@pytest.mark.parametrize("kind", [*EXPERTS, *OTHERS])
def test_every_name_is_found_and_written_as_peft_has_it(kind, tmp_path):
    made, opener = make(kind)
    made.save_pretrained(tmp_path / "base")
    base = opened(opener, tmp_path / "base")
    before = moe_models.logits(base)
    model = adapted(base)
    wanted = moe_models.logits(model)
    model.save_pretrained(tmp_path / "adapter")
    bound = 1e-4 * apart(wanted, before)
    assert bound > 0

    assert not check(
        tmp_path / "adapter", base=tmp_path / "base", runtime=["transformers"]
    ).findings
    merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged", dtype="f32")
    assert apart(moe_models.logits(opened(opener, tmp_path / "merged")), wanted) < bound
    foreign = under_names_of_disk(tmp_path / "base", tmp_path / "adapter", tmp_path / "foreign")
    merge(tmp_path / "base", [foreign], tmp_path / "again", dtype="f32")
    assert apart(moe_models.logits(opened(opener, tmp_path / "again")), wanted) < bound
    convert(foreign, tmp_path / "ours", base=tmp_path / "base", canonical=True)
    theirs = peft.PeftModel.from_pretrained(opened(opener, tmp_path / "base"), tmp_path / "ours")
    assert apart(moe_models.logits(theirs), wanted) < bound


def under_names_of_disk(base, adapter, target):
    """Copy an adapter with the checkpoint's own names, where a whole tensor is a module's."""
    target.mkdir()
    with open_model(base) as model:
        names = names_of(model)
        tensors = {}
        for name, tensor in load_file(adapter / "adapter_model.safetensors").items():
            module = re.sub(r"^base_model\.model\.|\.lora_[AB]\.weight$", "", name)
            stored = names.find(f"{module}.weight")
            new = stored.removesuffix(".weight") if stored else module
            tensors[name.replace(module, new, 1)] = tensor
    save_file(tensors, target / "adapter_model.safetensors")
    (target / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
    return target


def test_the_fast_way_is_transformers_own():
    """Types that are said to be stored as they are in memory have no conversion."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    for kind, prefix in _AS_STORED.items():
        config = transformers.AutoConfig.for_model(kind)
        assert get_checkpoint_conversion_mapping(kind) is None
        classes = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        assert get_checkpoint_conversion_mapping(classes.__name__) is None
        assert classes.base_model_prefix + "." == prefix


def test_a_layer_of_a_tower_is_never_taken_for_one_of_the_language_model():
    text = "model.language_model.layers.0.self_attn.q_proj.weight"
    tower = "model.vision_tower.layers.7.self_attn.q_proj.weight"
    names = BaseNames({text: (8, 8), tower: (8, 8)})
    assert names.find("model.layers.0.self_attn.q_proj.weight") == text
    assert names.find("model.layers.7.self_attn.q_proj.weight") is None
    assert names.find(tower) == tower


def test_what_cannot_be_followed_is_refused_with_its_reason(tmp_path):
    made = moe_models.make("inkling2_text")
    made.save_pretrained(tmp_path / "base")
    adapted(made).save_pretrained(tmp_path / "adapter")
    with open_model(tmp_path / "base") as base, open_adapter(tmp_path / "adapter", base=base) as a:
        assert a.deltas
    with pytest.raises(UnsupportedError, match="Interleave"):
        merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged")
