"""The llama architecture: Llama, Mistral and Mixtral.

llama.cpp rotates neighbouring dimensions here, so the rows of q_proj and k_proj change
places (``HeadOrder``).
"""

from __future__ import annotations

from loraformat_converters.gguf.architectures.config import Config
from loraformat_converters.gguf.architectures.decoder import (
    AROUND,
    COMMON_KEYS,
    HEAD_SIZE,
    LAYER_NORMS,
    MLP,
    SILU,
    sliding_note,
)
from loraformat_converters.gguf.architectures.metadata import either, experts, implied
from loraformat_converters.gguf.architectures.record import Architecture
from loraformat_converters.gguf.architectures.rope import (
    LONG_FACTORS,
    ROPE_FREQUENCIES,
    SHORT_FACTORS,
    Rope,
    rope_keys,
)
from loraformat_converters.gguf.architectures.weights import (
    expert_weights,
    key_heads,
    layer,
    query_heads,
    with_biases,
)

__all__ = ["LLAMA"]

_LLAMA = implied(
    attention_bias=lambda gguf: "blk.0.attn_q.bias" in gguf.tensors,
    mlp_bias=lambda gguf: "blk.0.ffn_gate.bias" in gguf.tensors,
)
_MIXTRAL = implied(model_type="mixtral", sliding_window=None)


def _rope(config: Config) -> Rope:
    theta = 1e6 if config.experts else 1e4
    return Rope(config, theta=theta, kinds=("linear", "yarn", "llama3", "longrope"))


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
    keys=(
        SILU,
        *COMMON_KEYS,
        HEAD_SIZE,
        rope_keys(_rope, dimensions=True),
        either(mixture=(experts("num_local_experts"), _MIXTRAL), dense=(_LLAMA,)),
    ),
    weights=(
        *AROUND,
        *with_biases(
            layer("attn_q", "self_attn.q_proj", "queries hidden", query_heads),
            layer("attn_k", "self_attn.k_proj", "keys hidden", key_heads),
            layer("attn_v", "self_attn.v_proj", "keys hidden"),
            layer("attn_output", "self_attn.o_proj", "hidden queries"),
        ),
        *LAYER_NORMS,
    ),
    dense=with_biases(*MLP),
    mixture=expert_weights("block_sparse_moe", "w1", "w3", "w2"),
    notes=sliding_note,
    bases=("model.", "language_model.model.", "model.language_model.", ""),
    extras=(ROPE_FREQUENCIES, LONG_FACTORS, SHORT_FACTORS),
)
