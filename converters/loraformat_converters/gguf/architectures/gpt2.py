"""The gpt2 architecture: ``Conv1D``, learned positions, a tied head."""

from __future__ import annotations

from functools import partial

from loraformat_converters.gguf.architectures.decoder import SIZE_KEYS, TIED, VOCABULARY
from loraformat_converters.gguf.architectures.metadata import number, only
from loraformat_converters.gguf.architectures.record import Architecture
from loraformat_converters.gguf.architectures.weights import conv1d, layer, row, with_biases

__all__ = ["GPT2"]

_layer = partial(layer, path="h")

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
    names={
        "num_hidden_layers": "n_layer",
        "max_position_embeddings": "n_positions",
        "hidden_size": "n_embd",
        "intermediate_size": "n_inner",
        "num_attention_heads": "n_head",
    },
    keys=(
        only(
            "activation_function", "gelu_new", "gelu_pytorch_tanh", "gelu",
            why="llama.cpp computes with gelu",
        ),
        only("scale_attn_weights", True, why="llama.cpp scales attention", implied=False),
        only(
            "scale_attn_by_inverse_layer_idx", False,
            why="llama.cpp scales all layers alike", implied=False,
        ),
        only("add_cross_attention", False, why="llama.cpp has no cross-attention", implied=False),
        *SIZE_KEYS,
        number("attention.layer_norm_epsilon", "layer_norm_epsilon"),
        VOCABULARY,
        TIED,
    ),
    weights=(
        row("token_embd.weight", "wte.weight", "* hidden"),
        row("position_embd.weight", "wpe.weight", "* hidden"),
        *with_biases(
            _layer("attn_norm", "ln_1"),
            _layer("attn_qkv", "attn.c_attn", "qkv hidden", conv1d),
            _layer("attn_output", "attn.c_proj", "hidden queries", conv1d),
            _layer("ffn_norm", "ln_2"),
            _layer("ffn_up", "mlp.c_fc", "inner hidden", conv1d),
            _layer("ffn_down", "mlp.c_proj", "hidden inner", conv1d),
            row("output_norm.weight", "ln_f.weight", "hidden"),
            required=True,
        ),
    ),
    bases=("transformer.", ""),
)  # fmt: skip
