"""The qwen2, qwen3 and qwen3moe architectures."""

from __future__ import annotations

from typing import Any

from loraformat.errors import UnsupportedError
from loraformat_converters.gguf.architectures.config import Config
from loraformat_converters.gguf.architectures.decoder import (
    AROUND,
    COMMON_KEYS,
    HEAD_SIZE,
    LAYER_NORMS,
    MLP,
    PROJECTIONS,
    QK_NORMS,
    SILU,
    sliding_note,
)
from loraformat_converters.gguf.architectures.metadata import (
    MetadataBuilder,
    MetadataRow,
    experts,
    implied,
    only,
    uint,
)
from loraformat_converters.gguf.architectures.record import Architecture
from loraformat_converters.gguf.architectures.rope import Rope, rope_keys
from loraformat_converters.gguf.architectures.weights import expert_weights, with_biases

__all__ = ["QWEN2", "QWEN3", "QWEN3MOE"]


def _check_heads(config: Config, keys: MetadataBuilder) -> None:
    if config.head_dim * config.heads != config.hidden:
        raise UnsupportedError(
            f"heads of {config.head_dim} dimensions do not add up to hidden_size, as llama.cpp "
            "wants of qwen2"
        )


def _notes(config: Config) -> list[str]:
    return sliding_note(config) if config.get("use_sliding_window") else []


_IN_EVERY_LAYER = "llama.cpp has experts in every layer"
_ROPE = rope_keys(lambda config: Rope(config, kinds=("linear", "yarn")))
_WINDOW = implied(use_sliding_window=False, sliding_window=None)
_QWEN3 = (
    SILU,
    *COMMON_KEYS,
    _ROPE,
    HEAD_SIZE,
    _WINDOW,
    implied(attention_bias=lambda gguf: "blk.0.attn_q.bias" in gguf.tensors),
)
#: llama.cpp has no bias for the output projection here.
_ATTENTION = (*AROUND, *with_biases(*PROJECTIONS[:3]), PROJECTIONS[3], *LAYER_NORMS, *QK_NORMS)
_COMMON: dict[str, Any] = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768,
}

QWEN2 = Architecture(
    name="qwen2",
    models={"qwen2": "Qwen2ForCausalLM"},
    defaults={"qwen2": {**_COMMON, "num_key_value_heads": 32}},
    keys=(MetadataRow(_check_heads), SILU, *COMMON_KEYS, _ROPE, _WINDOW),
    weights=(
        *AROUND,
        *with_biases(*PROJECTIONS[:3], required=True),
        PROJECTIONS[3],
        *LAYER_NORMS,
        *MLP,
    ),
    notes=_notes,
)
QWEN3 = Architecture(
    name="qwen3",
    models={"qwen3": "Qwen3ForCausalLM"},
    defaults={"qwen3": {**_COMMON, "num_key_value_heads": 32, "head_dim": 128}},
    keys=_QWEN3,
    weights=(*_ATTENTION, *MLP),
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
    keys=(
        only("norm_topk_prob", True, why="llama.cpp makes the chosen experts' weights add to 1"),
        only("decoder_sparse_step", 1, why=_IN_EVERY_LAYER),
        only("mlp_only_layers", [], why=_IN_EVERY_LAYER),
        *_QWEN3,
        experts("num_experts"),
        uint(
            "expert_feed_forward_length",
            "moe_intermediate_size",
            lambda m: max(int(m["intermediate_size"] // m["num_experts_per_tok"]), 1),
        ),
    ),
    weights=(*_ATTENTION, *expert_weights("mlp", "gate_proj", "up_proj", "down_proj")),
    notes=_notes,
)
