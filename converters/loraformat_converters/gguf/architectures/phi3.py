"""The phi3 architecture, with fused qkv_proj and gate_up_proj."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loraformat_converters.gguf.architectures.config import Config
from loraformat_converters.gguf.architectures.decoder import (
    AROUND,
    COMMON_KEYS,
    LAYER_NORMS,
    SILU,
    sliding_note,
)
from loraformat_converters.gguf.architectures.metadata import MetadataBuilder, MetadataRow
from loraformat_converters.gguf.architectures.record import Architecture
from loraformat_converters.gguf.architectures.rope import (
    LONG_FACTORS,
    SHORT_FACTORS,
    Rope,
    rope_keys,
)
from loraformat_converters.gguf.architectures.weights import layer

if TYPE_CHECKING:
    from loraformat_converters.gguf.container.reader import GGUFFile

__all__ = ["PHI3"]


def _rope(config: Config) -> Rope:
    return Rope(config, kinds=("linear", "yarn", "longrope"), partial=True)


def _check_heads(config: Config, keys: MetadataBuilder) -> None:
    config.only(
        "head_dim", None, config.hidden // config.heads,
        why="llama.cpp wants heads that add up to hidden_size",
    )  # fmt: skip


def _write_context(config: Config, keys: MetadataBuilder) -> None:
    keys.uint("rope.scaling.original_context_length", _rope(config).context)
    window = config.get("sliding_window")
    keys.uint("attention.sliding_window", window if isinstance(window, int) else 0)


def _read_context(gguf: GGUFFile, members: dict[str, Any]) -> None:
    members["original_max_position_embeddings"] = gguf.integer(
        "{arch}.rope.scaling.original_context_length", members["max_position_embeddings"]
    )
    # llama.cpp reads a window and does not use it.
    members["sliding_window"] = gguf.integer("{arch}.attention.sliding_window", 0) or None


PHI3 = Architecture(
    name="phi3",
    models={"phi3": "Phi3ForCausalLM"},
    defaults={
        "phi3": {
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
        }
    },
    keys=(
        SILU,
        MetadataRow(_check_heads),
        *COMMON_KEYS,
        rope_keys(_rope, dimensions=True),
        MetadataRow(_write_context, _read_context),
    ),
    weights=(
        *AROUND,
        LAYER_NORMS[0],
        layer("attn_qkv", "self_attn.qkv_proj", "qkv hidden"),
        layer("attn_output", "self_attn.o_proj", "hidden queries"),
        LAYER_NORMS[1],
        layer("ffn_up", "mlp.gate_up_proj", "gate_up hidden"),
        layer("ffn_down", "mlp.down_proj", "hidden inner"),
    ),
    notes=sliding_note,
    extras=(LONG_FACTORS, SHORT_FACTORS),
)
