"""The phi3 architecture, with fused qkv_proj and gate_up_proj."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loraformat_converters.gguf.architectures.config import Config
from loraformat_converters.gguf.architectures.decoder import (
    DECODER_ROWS,
    add_common_keys,
    common_config,
    rope_config,
    sliding_note,
)
from loraformat_converters.gguf.architectures.keys import MetadataBuilder
from loraformat_converters.gguf.architectures.names import layer
from loraformat_converters.gguf.architectures.record import Architecture
from loraformat_converters.gguf.architectures.rope import LONG_FACTORS, SHORT_FACTORS, Rope

if TYPE_CHECKING:
    from loraformat_converters.gguf.container import GGUFFile

__all__ = ["PHI3"]

_ROWS = (
    *DECODER_ROWS,
    layer("attn_norm", "input_layernorm"),
    layer("attn_qkv", "self_attn.qkv_proj"),
    layer("attn_output", "self_attn.o_proj"),
    layer("ffn_norm", "post_attention_layernorm"),
    layer("ffn_up", "mlp.gate_up_proj"),
    layer("ffn_down", "mlp.down_proj"),
)


def _rope(config: Config) -> Rope:
    return Rope(config, kinds=("linear", "yarn", "longrope"), partial=True)


def _keys(config: Config, keys: MetadataBuilder) -> None:
    config.only("hidden_act", "silu", why="llama.cpp computes with silu")
    config.only(
        "head_dim", None, config.integer("hidden_size") // config.heads,
        why="llama.cpp wants heads that add up to hidden_size",
    )  # fmt: skip
    rope = _rope(config)
    add_common_keys(config, keys)
    keys.uint("rope.dimension_count", rope.dimensions)
    rope.add_keys(keys)
    keys.uint("rope.scaling.original_context_length", rope.context)
    window = config.get("sliding_window")
    keys.uint("attention.sliding_window", window if isinstance(window, int) else 0)


def _config(gguf: GGUFFile) -> dict[str, Any]:
    config = common_config(gguf)
    rope = rope_config(gguf, config.pop("head_dim"))
    whole = config["max_position_embeddings"]
    context = gguf.integer("{arch}.rope.scaling.original_context_length", whole)
    return {
        **config,
        **rope,
        "model_type": "phi3",
        "original_max_position_embeddings": context,
        # llama.cpp reads a window and does not use it.
        "sliding_window": gguf.integer("{arch}.attention.sliding_window", 0) or None,
    }


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
    rows=lambda config: _ROWS,
    keys=_keys,
    config=_config,
    tensors=lambda config: _rope(config).tensors(),
    notes=sliding_note,
    extras=(LONG_FACTORS, SHORT_FACTORS),
)
