"""The bert architecture: an encoder for embeddings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loraformat_converters.gguf.architectures.config import MAX_LAYERS, Config
from loraformat_converters.gguf.architectures.decoder import bounded, short, vocabulary
from loraformat_converters.gguf.architectures.keys import MetadataBuilder
from loraformat_converters.gguf.architectures.names import WeightName, bias, layer, row
from loraformat_converters.gguf.architectures.record import Architecture
from loraformat_converters.gguf.types import ValueType
from loraformat_converters.gguf.values import GGUFValue

if TYPE_CHECKING:
    from loraformat_converters.gguf.container import GGUFFile

__all__ = ["BERT"]


def _both(gguf: str, hf: str) -> tuple[WeightName, WeightName]:
    weight = layer(gguf, hf, path="encoder.layer")
    return weight, bias(weight, required=True)


_EMBEDDING_NORM = row("token_embd_norm.weight", "embeddings.LayerNorm.weight")
_ROWS = (
    row("token_embd.weight", "embeddings.word_embeddings.weight"),
    row("position_embd.weight", "embeddings.position_embeddings.weight"),
    row("token_types.weight", "embeddings.token_type_embeddings.weight"),
    _EMBEDDING_NORM,
    bias(_EMBEDDING_NORM, required=True),
    *_both("attn_q", "attention.self.query"),
    *_both("attn_k", "attention.self.key"),
    *_both("attn_v", "attention.self.value"),
    *_both("attn_output", "attention.output.dense"),
    *_both("attn_output_norm", "attention.output.LayerNorm"),
    *_both("ffn_up", "intermediate.dense"),
    *_both("ffn_down", "output.dense"),
    *_both("layer_output_norm", "output.LayerNorm"),
)


def _keys(config: Config, keys: MetadataBuilder) -> None:
    config.only(
        "hidden_act", "gelu", "gelu_new", "gelu_pytorch_tanh", why="llama.cpp computes with gelu"
    )
    config.only("position_embedding_type", None, "absolute", why="llama.cpp adds positions")
    config.only("is_decoder", False, None, why="llama.cpp's bert is an encoder")
    keys.uint("block_count", config.layers)
    keys.uint("context_length", config.integer("max_position_embeddings"))
    keys.uint("embedding_length", config.integer("hidden_size"))
    keys.uint("feed_forward_length", config.integer("intermediate_size"))
    keys.uint("attention.head_count", config.heads)
    keys.float("attention.layer_norm_epsilon", config.number("layer_norm_eps"))
    keys.flag("attention.causal", False)
    keys.uint("vocab_size", config.integer("vocab_size"))
    # It belongs to the tokenizer's keys, and the model does not load without it.
    count = config.integer("type_vocab_size")
    keys["tokenizer.ggml.token_type_count"] = GGUFValue.of(ValueType.UINT32, count)


def _config(gguf: GGUFFile) -> dict[str, Any]:
    types = gguf.tensors.get("token_types.weight")
    return {
        "model_type": "bert",
        "vocab_size": vocabulary(gguf),
        "hidden_size": bounded(gguf, "{arch}.embedding_length"),
        "num_hidden_layers": bounded(gguf, "{arch}.block_count", MAX_LAYERS),
        "num_attention_heads": bounded(gguf, "{arch}.attention.head_count"),
        "intermediate_size": bounded(gguf, "{arch}.feed_forward_length"),
        "max_position_embeddings": bounded(gguf, "{arch}.context_length"),
        "type_vocab_size": types.shape[0] if types is not None else 2,
        "layer_norm_eps": short(gguf.number("{arch}.attention.layer_norm_epsilon")),
        "hidden_act": "gelu",
        "position_embedding_type": "absolute",
    }


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
    rows=lambda config: _ROWS,
    keys=_keys,
    config=_config,
    head=None,
    generates=False,
    bases=("", "bert."),
    unused=("pooler.", "cls.", "embeddings.position_ids"),
    notes=lambda config: ["llama.cpp's bert has no pooler and no head: embeddings only"],
)
