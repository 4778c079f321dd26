"""Unusual but legitimate adapters, made by PEFT itself: what it computes, we merge and write."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from loraformat.ops.adapter_output.output import write_adapter
from loraformat.ops.merge.merge import merge
from loraformat.ops.opening.adapter import open_adapter
from loraformat.ops.opening.model import open_model
from tests.adapters.peft_models import (
    gpt2,
    gpt_oss,
    gpt_oss_square,
    llama,
    llama_tied,
    logits,
    merged_by_peft,
    mixtral,
    qwen2,
    qwen3_moe,
    qwen3_moe_square,
    trained,
)

ALL = ["q_proj", "v_proj", "up_proj", "down_proj"]
CONV = ["c_attn", "c_fc", "c_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
MOE = {"target_modules": ["q_proj"], "target_parameters": EXPERTS}

CASES = {
    "plain": (llama, {"target_modules": ALL}),
    "all-linear": (llama, {"target_modules": "all-linear"}),
    "patterns": (
        llama,
        {
            "target_modules": ALL,
            "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 5, "^model.*down_proj": 3},
            "alpha_pattern": {"v_proj": 3, r".*\.0\.(self_attn|mlp)\.(q|up)_proj": 40},
        },
    ),
    "rslora": (llama, {"target_modules": ALL, "use_rslora": True, "rank_pattern": {"q_proj": 2}}),
    "dora": (llama, {"target_modules": ALL, "use_dora": True}),
    "dora-rslora": (llama, {"target_modules": ALL, "use_dora": True, "use_rslora": True}),
    "dora-embedding": (llama, {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True}),
    "dora-conv1d": (gpt2, {"target_modules": CONV, "use_dora": True, "fan_in_fan_out": True}),
    "float-alpha": (llama, {"target_modules": ALL, "lora_alpha": 0.5}),
    "lora-bias": (qwen2, {"target_modules": ["q_proj", "v_proj"], "lora_bias": True}),
    "bias-all": (qwen2, {"target_modules": ["q_proj"], "bias": "all"}),
    "bias-lora-only": (qwen2, {"target_modules": ["q_proj"], "bias": "lora_only"}),
    "saved": (llama, {"target_modules": ALL, "modules_to_save": ["lm_head", "embed_tokens"]}),
    "saved-norm": (llama, {"target_modules": ALL, "modules_to_save": ["norm"]}),
    "saved-tied": (llama_tied, {"target_modules": ALL, "modules_to_save": ["embed_tokens"]}),
    "saved-tied-both": (
        llama_tied,
        {"target_modules": ALL, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "embedding": (llama, {"target_modules": ["embed_tokens", "q_proj"]}),
    "head": (llama, {"target_modules": ["lm_head", "q_proj"]}),
    "head-tied": (llama_tied, {"target_modules": ["lm_head", "q_proj"]}),
    "embedding-tied": (llama_tied, {"target_modules": ["embed_tokens", "q_proj"]}),
    "both-tied": (llama_tied, {"target_modules": ["embed_tokens", "lm_head"]}),
    "both-kept-tied": (
        llama_tied,
        {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
    ),
    "tokens": (llama, {"target_modules": ALL, "trainable_token_indices": [9, 3, 5]}),
    "tokens-tied": (llama_tied, {"target_modules": ALL, "trainable_token_indices": [9, 3]}),
    "tokens-named": (
        llama,
        {
            "target_modules": ALL,
            "trainable_token_indices": {"embed_tokens": [3, 9], "lm_head": [4, 11, 2]},
        },
    ),
    "conv1d": (gpt2, {"target_modules": CONV, "fan_in_fan_out": True}),
    "conv1d-unset": (gpt2, {"target_modules": CONV}),
    "conv1d-embedding": (gpt2, {"target_modules": ["wte", "c_attn"], "fan_in_fan_out": True}),
    "some-layers": (llama, {"target_modules": ALL, "layers_to_transform": [1]}),
    "regex": (llama, {"target_modules": r".*layers\.(0|1)\..*(q|o)_proj"}),
    "mixtral": (mixtral, MOE),
    "mixtral-router": (mixtral, {"target_modules": [], "target_parameters": ["mlp.gate.weight"]}),
    "qwen3-moe": (qwen3_moe, MOE | {"rank_pattern": {"experts.down_proj": 2}}),
    "qwen3-moe-rslora": (qwen3_moe, MOE | {"use_rslora": True}),
    "qwen3-moe-alpha": (qwen3_moe, MOE | {"alpha_pattern": {"gate_up_proj": 3}}),
    "qwen3-moe-down": (qwen3_moe, MOE | {"target_parameters": EXPERTS[1:]}),
    "qwen3-moe-up": (qwen3_moe, MOE | {"target_parameters": EXPERTS[:1]}),
    "qwen3-moe-square": (qwen3_moe_square, MOE),
    "gpt-oss": (gpt_oss, MOE),
    "gpt-oss-square": (gpt_oss_square, MOE),
    "gpt-oss-biases": (
        gpt_oss,
        {"target_modules": [], "target_parameters": [*EXPERTS, "experts.down_proj_bias"]},
    ),
    "linear-as-parameter": (
        llama, {"target_modules": [], "target_parameters": ["self_attn.q_proj.weight"]},
    ),
}  # fmt: skip
#: What PEFT's own merge gets wrong; its unmerged model is right, and held against ours.
PEFT_MERGES_WRONG = {
    "head-tied", "embedding-tied", "both-tied", "both-kept-tied", "saved-tied", "conv1d-embedding",
}  # fmt: skip


@pytest.fixture(params=CASES)
def case(request, tmp_path):
    build, options = CASES[request.param]
    return request.param, *trained(build, options, tmp_path)


def same(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, atol=3e-5, rtol=1e-4)


def test_peft_and_we_compute_the_same(case, tmp_path: Path) -> None:
    name, base, adapter = case
    wanted = logits(base, adapter)
    assert (wanted - logits(base)).abs().max() > 0.002  # the adapter does something
    merge(base, [adapter], tmp_path / "merged")
    same(logits(tmp_path / "merged"), wanted)
    with open_adapter(adapter) as opened:
        write_adapter(opened, tmp_path / "written")
    same(logits(base, tmp_path / "written"), wanted)
    with open_model(base) as checkpoint, open_adapter(adapter, base=checkpoint) as opened:
        write_adapter(opened, tmp_path / "held")  # names as in memory, though the base's differ
    held, free = (
        load_file(tmp_path / n / "adapter_model.safetensors") for n in ("held", "written")
    )
    assert held.keys() == free.keys() and all(torch.equal(held[k], free[k]) for k in held)
    config = json.loads((tmp_path / "written" / "adapter_config.json").read_text())
    assert config["use_rslora"] is False and config["lora_alpha"] == config["r"]
    merge(base, [tmp_path / "written"], tmp_path / "again")
    same(logits(tmp_path / "again"), wanted)
    if name not in PEFT_MERGES_WRONG:
        with torch.no_grad():
            theirs = merged_by_peft(base, adapter).state_dict()
        ours = merged_by_transformers(tmp_path / "merged")
        for key, value in theirs.items():
            torch.testing.assert_close(ours[key], value, atol=3e-6, rtol=1e-4, msg=key)


def merged_by_transformers(path: Path) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).state_dict()
