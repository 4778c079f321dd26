"""The bert architecture: an encoder for embeddings."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from loraformat_converters.gguf.architectures.config import Config
from loraformat_converters.gguf.architectures.decoder import SIZE_KEYS, VOCABULARY
from loraformat_converters.gguf.architectures.metadata import (
    MetadataBuilder,
    MetadataRow,
    number,
    only,
)
from loraformat_converters.gguf.architectures.record import Architecture
from loraformat_converters.gguf.architectures.weights import layer, row, with_biases
from loraformat_converters.gguf.container.values import GGUFValue

if TYPE_CHECKING:
    from loraformat_converters.gguf.container.reader import GGUFFile

__all__ = ["BERT"]

_layer = partial(layer, path="encoder.layer")


def _write_encoder(config: Config, keys: MetadataBuilder) -> None:
    keys.flag("attention.causal", False)


def _write_token_types(config: Config, keys: MetadataBuilder) -> None:
    # It belongs to the tokenizer's keys, and the model does not load without it.
    count = config.integer("type_vocab_size")
    keys["tokenizer.ggml.token_type_count"] = GGUFValue.uint(count)


def _read_token_types(gguf: GGUFFile, members: dict[str, Any]) -> None:
    types = gguf.tensors.get("token_types.weight")
    members["type_vocab_size"] = types.shape[0] if types is not None else 2


BERT = Architecture(
    name="bert",
    models={"bert": "BertModel"},
    defaults={
        "bert": {
            "vocab_size": 30522,
            "hidden_size": 768,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "intermediate_size": 3072,
            "max_position_embeddings": 512,
            "type_vocab_size": 2,
            "layer_norm_eps": 1e-12,
            "hidden_act": "gelu",
            "tie_word_embeddings": True,
        }
    },
    keys=(
        only(
            "hidden_act", "gelu", "gelu_new", "gelu_pytorch_tanh",
            why="llama.cpp computes with gelu",
        ),
        only("position_embedding_type", "absolute", None, why="llama.cpp adds positions"),
        only("is_decoder", False, None, why="llama.cpp's bert is an encoder", implied=False),
        *SIZE_KEYS,
        number("attention.layer_norm_epsilon", "layer_norm_eps"),
        MetadataRow(_write_encoder),
        VOCABULARY,
        MetadataRow(_write_token_types, _read_token_types),
    ),
    weights=(
        row("token_embd.weight", "embeddings.word_embeddings.weight", "* hidden"),
        row("position_embd.weight", "embeddings.position_embeddings.weight", "* hidden"),
        row("token_types.weight", "embeddings.token_type_embeddings.weight", "* hidden"),
        *with_biases(
            row("token_embd_norm.weight", "embeddings.LayerNorm.weight", "hidden"),
            _layer("attn_q", "attention.self.query", "queries hidden"),
            _layer("attn_k", "attention.self.key", "keys hidden"),
            _layer("attn_v", "attention.self.value", "keys hidden"),
            _layer("attn_output", "attention.output.dense", "hidden queries"),
            _layer("attn_output_norm", "attention.output.LayerNorm"),
            _layer("ffn_up", "intermediate.dense", "inner hidden"),
            _layer("ffn_down", "output.dense", "hidden inner"),
            _layer("layer_output_norm", "output.LayerNorm"),
            required=True,
        ),
    ),
    head=None,
    generates=False,
    bases=("", "bert."),
    unused=("pooler.", "cls.", "embeddings.position_ids"),
    notes=lambda config: ["llama.cpp's bert has no pooler and no head: embeddings only"],
)  # fmt: skip
