"""The qwen2, qwen3 and qwen3moe architectures."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from loraformat.errors import UnsupportedError
from loraformat_converters.gguf.architectures.config import Config
from loraformat_converters.gguf.architectures.decoder import (
    DECODER_ROWS,
    MLP,
    PROJECTIONS,
    QK_NORMS,
    add_common_keys,
    add_head_size,
    bounded,
    common_config,
    rope_config,
    sliding_note,
    with_biases,
)
from loraformat_converters.gguf.architectures.keys import MetadataBuilder
from loraformat_converters.gguf.architectures.names import ExpertWeightName, WeightName, layer
from loraformat_converters.gguf.architectures.record import Architecture
from loraformat_converters.gguf.architectures.rope import Rope

if TYPE_CHECKING:
    from loraformat_converters.gguf.container import GGUFFile

__all__ = ["QWEN2", "QWEN3", "QWEN3MOE"]

_NORMS = (
    layer("attn_norm", "input_layernorm"),
    layer("ffn_norm", "post_attention_layernorm"),
)
#: llama.cpp has no bias for the output projection here.
_ATTENTION = (*with_biases(PROJECTIONS[:3]), PROJECTIONS[3], *_NORMS)
_QWEN2_ATTENTION = (*with_biases(PROJECTIONS[:3], required=True), PROJECTIONS[3], *_NORMS)
_FUSED = "{base}layers.{layer}.mlp.experts"
_EXPERTS: tuple[WeightName | ExpertWeightName, ...] = (
    layer("ffn_gate_inp", "mlp.gate"),
    ExpertWeightName("blk.{layer}.ffn_gate_exps.weight", f"{_FUSED}.{{expert}}.gate_proj.weight",
              f"{_FUSED}.gate_up_proj", 0),
    ExpertWeightName("blk.{layer}.ffn_up_exps.weight", f"{_FUSED}.{{expert}}.up_proj.weight",
              f"{_FUSED}.gate_up_proj", 1),
    ExpertWeightName("blk.{layer}.ffn_down_exps.weight", f"{_FUSED}.{{expert}}.down_proj.weight",
              f"{_FUSED}.down_proj"),
)  # fmt: skip


def _rope(config: Config) -> Rope:
    return Rope(config, kinds=("linear", "yarn"))


def _qwen_keys(config: Config, keys: MetadataBuilder) -> None:
    config.only("hidden_act", "silu", why="llama.cpp computes with silu")
    add_common_keys(config, keys)
    _rope(config).add_keys(keys)


def _qwen2_keys(config: Config, keys: MetadataBuilder) -> None:
    if config.head_dim * config.heads != config.integer("hidden_size"):
        raise UnsupportedError(
            f"heads of {config.head_dim} dimensions do not add up to hidden_size, as llama.cpp "
            "wants of qwen2"
        )
    _qwen_keys(config, keys)


def _qwen3_keys(config: Config, keys: MetadataBuilder) -> None:
    _qwen_keys(config, keys)
    add_head_size(config, keys)


def _qwen3moe_keys(config: Config, keys: MetadataBuilder) -> None:
    config.only("norm_topk_prob", True, why="llama.cpp makes the chosen experts' weights add to 1")
    config.only("decoder_sparse_step", 1, why="llama.cpp has experts in every layer")
    config.only("mlp_only_layers", [], why="llama.cpp has experts in every layer")
    _qwen3_keys(config, keys)
    keys.uint("expert_count", config.experts)
    keys.uint("expert_used_count", config.integer("num_experts_per_tok", most=config.experts))
    keys.uint("expert_feed_forward_length", config.integer("moe_intermediate_size"))


def _config(gguf: GGUFFile, model_type: str) -> dict[str, Any]:
    config = common_config(gguf)
    config.pop("experts", 0)
    config |= rope_config(gguf, config["head_dim"])
    return {
        **config,
        "model_type": model_type,
        "use_sliding_window": False,
        "sliding_window": None,
        "attention_bias": "blk.0.attn_q.bias" in gguf.tensors,
    }


def _qwen2_config(gguf: GGUFFile) -> dict[str, Any]:
    config = _config(gguf, "qwen2")
    del config["attention_bias"], config["head_dim"]  # it has biases, and whole heads
    return config


def _qwen3moe_config(gguf: GGUFFile) -> dict[str, Any]:
    experts = bounded(gguf, "{arch}.expert_count")
    used = bounded(gguf, "{arch}.expert_used_count", experts)
    whole = bounded(gguf, "{arch}.feed_forward_length")
    size = bounded(gguf, "{arch}.expert_feed_forward_length", default=max(whole // used, 1))
    return {
        **_config(gguf, "qwen3_moe"),
        "num_experts": experts,
        "num_experts_per_tok": used,
        "moe_intermediate_size": size,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _notes(config: Config) -> list[str]:
    return sliding_note(config, bool(config.get("use_sliding_window")))


_COMMON: dict[str, Any] = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768,
}

QWEN2 = Architecture(
    name="qwen2",
    models={"qwen2": "Qwen2ForCausalLM"},
    defaults={"qwen2": {**_COMMON, "num_key_value_heads": 32}},
    rows=lambda config: (*DECODER_ROWS, *_QWEN2_ATTENTION, *MLP),
    keys=_qwen2_keys,
    config=_qwen2_config,
    notes=_notes,
)
QWEN3 = Architecture(
    name="qwen3",
    models={"qwen3": "Qwen3ForCausalLM"},
    defaults={"qwen3": {**_COMMON, "num_key_value_heads": 32, "head_dim": 128}},
    rows=lambda config: (*DECODER_ROWS, *_ATTENTION, *QK_NORMS, *MLP),
    keys=_qwen3_keys,
    config=partial(_config, model_type="qwen3"),
    notes=_notes,
)
QWEN3MOE = Architecture(
    name="qwen3moe",
    models={"qwen3_moe": "Qwen3MoeForCausalLM"},
    defaults={
        "qwen3_moe": {
            **_COMMON,
            "num_key_value_heads": 4,
            "moe_intermediate_size": 768,
            "num_experts_per_tok": 8,
            "num_experts": 128,
            "norm_topk_prob": False,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    },
    rows=lambda config: (*DECODER_ROWS, *_ATTENTION, *QK_NORMS, *_EXPERTS),
    keys=_qwen3moe_keys,
    config=_qwen3moe_config,
    notes=_notes,
)
