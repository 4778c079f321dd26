"""The llama architecture: Llama, Mistral and Mixtral.

llama.cpp rotates neighbouring dimensions here, so the rows of q_proj and k_proj change
places (``HeadOrder``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loraformat_converters.gguf.architectures.config import Config
from loraformat_converters.gguf.architectures.decoder import (
    DECODER_ROWS,
    MLP,
    add_common_keys,
    add_head_size,
    bounded,
    common_config,
    rope_config,
    sliding_note,
    with_biases,
)
from loraformat_converters.gguf.architectures.keys import MetadataBuilder
from loraformat_converters.gguf.architectures.names import (
    ExpertWeightName,
    WeightName,
    key_heads,
    layer,
    query_heads,
)
from loraformat_converters.gguf.architectures.record import Architecture
from loraformat_converters.gguf.architectures.rope import (
    LONG_FACTORS,
    ROPE_FREQUENCIES,
    SHORT_FACTORS,
    Rope,
)

if TYPE_CHECKING:
    from loraformat_converters.gguf.container import GGUFFile

__all__ = ["LLAMA"]

_ATTENTION = (
    *with_biases(
        (
            layer("attn_q", "self_attn.q_proj", query_heads),
            layer("attn_k", "self_attn.k_proj", key_heads),
            layer("attn_v", "self_attn.v_proj"),
            layer("attn_output", "self_attn.o_proj"),
        )
    ),
    layer("attn_norm", "input_layernorm"),
    layer("ffn_norm", "post_attention_layernorm"),
)
_MOE = "{base}layers.{layer}.block_sparse_moe"
_FUSED = "{base}layers.{layer}.mlp.experts"
_EXPERTS: tuple[WeightName | ExpertWeightName, ...] = (
    WeightName("blk.{layer}.ffn_gate_inp.weight", f"{_MOE}.gate.weight"),
    ExpertWeightName("blk.{layer}.ffn_gate_exps.weight", f"{_MOE}.experts.{{expert}}.w1.weight",
              f"{_FUSED}.gate_up_proj", 0),
    ExpertWeightName("blk.{layer}.ffn_up_exps.weight", f"{_MOE}.experts.{{expert}}.w3.weight",
              f"{_FUSED}.gate_up_proj", 1),
    ExpertWeightName("blk.{layer}.ffn_down_exps.weight", f"{_MOE}.experts.{{expert}}.w2.weight",
              f"{_FUSED}.down_proj"),
)  # fmt: skip
_KINDS = ("linear", "yarn", "llama3", "longrope")


def _rows(config: Config) -> tuple[WeightName | ExpertWeightName, ...]:
    return (*DECODER_ROWS, *_ATTENTION, *(_EXPERTS if config.experts else with_biases(MLP)))


def _rope(config: Config) -> Rope:
    return Rope(config, kinds=_KINDS, theta=1e6 if config.experts else 1e4)


def _keys(config: Config, keys: MetadataBuilder) -> None:
    config.only("hidden_act", "silu", why="llama.cpp computes with silu")
    add_common_keys(config, keys)
    add_head_size(config, keys)
    keys.uint("rope.dimension_count", config.head_dim)
    _rope(config).add_keys(keys)
    if config.experts:
        keys.uint("expert_count", config.experts)
        keys.uint("expert_used_count", config.integer("num_experts_per_tok", most=config.experts))


def _config(gguf: GGUFFile) -> dict[str, Any]:
    config = common_config(gguf)
    config |= rope_config(gguf, config["head_dim"])
    if experts := config.pop("experts", 0):
        used = bounded(gguf, "{arch}.expert_used_count", experts)
        return {
            **config,
            "model_type": "mixtral",
            "num_local_experts": experts,
            "num_experts_per_tok": used,
            "sliding_window": None,
        }
    return {
        **config,
        "model_type": "llama",
        "attention_bias": "blk.0.attn_q.bias" in gguf.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in gguf.tensors,
    }


LLAMA = Architecture(
    name="llama",
    models={
        "llama": "LlamaForCausalLM",
        "mistral": "MistralForCausalLM",
        "mixtral": "MixtralForCausalLM",
    },
    defaults={
        "llama": {"hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 2048},
        "mistral": {
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "num_key_value_heads": 8,
            "sliding_window": 4096,
            "max_position_embeddings": 131072,
        },
        "mixtral": {
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
    },
    rows=_rows,
    keys=_keys,
    config=_config,
    tensors=lambda config: _rope(config).tensors(),
    notes=sliding_note,
    bases=("model.", "language_model.model.", "model.language_model.", ""),
    extras=(ROPE_FREQUENCIES, LONG_FACTORS, SHORT_FACTORS),
)
