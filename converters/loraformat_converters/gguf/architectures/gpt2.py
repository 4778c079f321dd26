"""The gpt2 architecture: ``Conv1D``, learned positions, a tied head."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loraformat_converters.gguf.architectures.config import MAX_LAYERS, Config
from loraformat_converters.gguf.architectures.decoder import (
    bounded,
    has_own_head,
    short,
    vocabulary,
)
from loraformat_converters.gguf.architectures.keys import MetadataBuilder
from loraformat_converters.gguf.architectures.names import bias, conv1d, layer, row
from loraformat_converters.gguf.architectures.record import Architecture

if TYPE_CHECKING:
    from loraformat_converters.gguf.architectures.names import WeightName
    from loraformat_converters.gguf.container import GGUFFile

__all__ = ["GPT2"]


def _both(weight: WeightName) -> tuple[WeightName, WeightName]:
    return weight, bias(weight, required=True)


_ROWS = (
    row("token_embd.weight", "wte.weight"),
    row("position_embd.weight", "wpe.weight"),
    *_both(layer("attn_norm", "ln_1", path="h")),
    *_both(layer("attn_qkv", "attn.c_attn", conv1d, path="h")),
    *_both(layer("attn_output", "attn.c_proj", conv1d, path="h")),
    *_both(layer("ffn_norm", "ln_2", path="h")),
    *_both(layer("ffn_up", "mlp.c_fc", conv1d, path="h")),
    *_both(layer("ffn_down", "mlp.c_proj", conv1d, path="h")),
    *_both(row("output_norm.weight", "ln_f.weight")),
)


def _keys(config: Config, keys: MetadataBuilder) -> None:
    config.only(
        "activation_function", "gelu_new", "gelu_pytorch_tanh", "gelu",
        why="llama.cpp computes with gelu",
    )  # fmt: skip
    config.only("scale_attn_weights", True, why="llama.cpp scales attention")
    config.only("scale_attn_by_inverse_layer_idx", False, why="llama.cpp scales all layers alike")
    config.only("add_cross_attention", False, why="llama.cpp has no cross-attention")
    width = config.integer("n_embd")
    keys.uint("block_count", config.integer("n_layer", most=MAX_LAYERS))
    keys.uint("context_length", config.integer("n_positions"))
    keys.uint("embedding_length", width)
    keys.uint("feed_forward_length", config.inner)
    keys.uint("attention.head_count", config.integer("n_head"))
    keys.float("attention.layer_norm_epsilon", config.number("layer_norm_epsilon"))
    keys.uint("vocab_size", config.integer("vocab_size"))


def _config(gguf: GGUFFile) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "vocab_size": vocabulary(gguf),
        "n_positions": bounded(gguf, "{arch}.context_length"),
        "n_embd": bounded(gguf, "{arch}.embedding_length"),
        "n_layer": bounded(gguf, "{arch}.block_count", MAX_LAYERS),
        "n_head": bounded(gguf, "{arch}.attention.head_count"),
        "n_inner": bounded(gguf, "{arch}.feed_forward_length"),
        "layer_norm_epsilon": short(gguf.number("{arch}.attention.layer_norm_epsilon")),
        "activation_function": "gelu_new",
        "tie_word_embeddings": not has_own_head(gguf),
    }


GPT2 = Architecture(
    name="gpt2",
    models={"gpt2": "GPT2LMHeadModel"},
    defaults={
        "gpt2": {
            "vocab_size": 50257,
            "n_positions": 1024,
            "n_embd": 768,
            "n_layer": 12,
            "n_head": 12,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-5,
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
            "tie_word_embeddings": True,
        }
    },
    rows=lambda config: _ROWS,
    keys=_keys,
    config=_config,
    bases=("transformer.", ""),
)
