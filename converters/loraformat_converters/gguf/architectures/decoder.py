"""Rows that most decoders share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loraformat.errors import InputError
from loraformat_converters.gguf.architectures.config import MAX_LAYERS, Config
from loraformat_converters.gguf.architectures.metadata import (
    MetadataBuilder,
    MetadataRow,
    head_size,
    implied,
    number,
    only,
    uint,
)
from loraformat_converters.gguf.architectures.weights import layer, row

if TYPE_CHECKING:
    from loraformat_converters.gguf.container.reader import GGUFFile

__all__ = [
    "AROUND", "COMMON_KEYS", "HEAD_SIZE", "LAYER_NORMS", "MLP", "PROJECTIONS", "QK_NORMS", "SILU",
    "SIZE_KEYS", "TIED", "VOCABULARY", "has_own_head", "sliding_note",
]  # fmt: skip

#: Bytes that are compared at a time.
_COMPARED = 1 << 22

#: Around the layers.
AROUND = (
    row("token_embd.weight", "embed_tokens.weight", "* hidden"),
    row("output_norm.weight", "norm.weight", "hidden"),
)
MLP = (
    layer("ffn_gate", "mlp.gate_proj", "inner hidden"),
    layer("ffn_up", "mlp.up_proj", "inner hidden"),
    layer("ffn_down", "mlp.down_proj", "hidden inner"),
)
PROJECTIONS = (
    layer("attn_q", "self_attn.q_proj", "queries hidden"),
    layer("attn_k", "self_attn.k_proj", "keys hidden"),
    layer("attn_v", "self_attn.v_proj", "keys hidden"),
    layer("attn_output", "self_attn.o_proj", "hidden queries"),
)
LAYER_NORMS = (
    layer("attn_norm", "input_layernorm"),
    layer("ffn_norm", "post_attention_layernorm"),
)
QK_NORMS = (
    layer("attn_q_norm", "self_attn.q_norm", "head_dim"),
    layer("attn_k_norm", "self_attn.k_norm", "head_dim"),
)


def has_own_head(gguf: GGUFFile) -> bool:
    """Tell whether a file has an output head that is more than a copy of its embedding."""
    import numpy

    embedding, head = (gguf.tensors.get(n) for n in ("token_embd.weight", "output.weight"))
    if embedding is None or head is None:
        return head is not None
    if (embedding.type, embedding.shape) != (head.type, head.shape):
        return True
    one, other = (numpy.frombuffer(gguf.load(t.name), "u1") for t in (embedding, head))
    starts = range(0, len(one), _COMPARED)
    return any((one[n : n + _COMPARED] != other[n : n + _COMPARED]).any() for n in starts)


def _write_vocabulary(config: Config, keys: MetadataBuilder) -> None:
    keys.uint("vocab_size", config.integer("vocab_size"))


def _read_vocabulary(gguf: GGUFFile, members: dict[str, Any]) -> None:
    embedding = gguf.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise InputError("has no tensor token_embd.weight of two dimensions", path=gguf.path)
    members["vocab_size"] = embedding.shape[0]


def _write_head_size(config: Config, keys: MetadataBuilder) -> None:
    keys.uint("attention.key_length", config.head_dim)
    keys.uint("attention.value_length", config.head_dim)


def _read_head_size(gguf: GGUFFile, members: dict[str, Any]) -> None:
    members["head_dim"] = head_size(gguf, members)


#: Tokens: those of the embedding, whatever the key says.
VOCABULARY = MetadataRow(_write_vocabulary, _read_vocabulary)
TIED = implied(tie_word_embeddings=lambda gguf: not has_own_head(gguf))
HEAD_SIZE = MetadataRow(_write_head_size, _read_head_size)
SILU = only("hidden_act", "silu", why="llama.cpp computes with silu")
SIZE_KEYS = (
    uint("block_count", "num_hidden_layers", most=MAX_LAYERS),
    uint("context_length", "max_position_embeddings"),
    uint("embedding_length", "hidden_size"),
    uint("feed_forward_length", "intermediate_size"),
    uint("attention.head_count", "num_attention_heads"),
)
#: What llama.cpp asks of every decoder with RMS norms.
COMMON_KEYS = (
    *SIZE_KEYS,
    uint("attention.head_count_kv", "num_key_value_heads", lambda m: int(m["num_attention_heads"])),
    number("attention.layer_norm_rms_epsilon", "rms_norm_eps"),
    VOCABULARY,
    TIED,
)


def sliding_note(config: Config) -> list[str]:
    """Say that llama.cpp lets every token see all others, if the model does not."""
    window = config.get("sliding_window")
    if not isinstance(window, int) or window <= 0:
        return []
    if window >= config.integer("max_position_embeddings"):
        return []
    return [
        f"the model attends to the last {window} tokens only, and llama.cpp to all: beyond that "
        "length they compute differently"
    ]
