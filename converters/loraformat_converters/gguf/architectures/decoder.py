"""Common parts of decoder architectures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loraformat.errors import InputError
from loraformat_converters.gguf.architectures.config import MAX_EXPERTS, MAX_LAYERS, Config
from loraformat_converters.gguf.architectures.keys import MetadataBuilder
from loraformat_converters.gguf.architectures.names import WeightName, bias, layer, row
from loraformat_converters.gguf.architectures.rope import (
    LONG_FACTORS,
    ROPE_FREQUENCIES,
    SHORT_FACTORS,
    llama3_parameters,
)

if TYPE_CHECKING:
    from loraformat_converters.gguf.container import GGUFFile

__all__ = [
    "DECODER_ROWS",
    "MLP",
    "PROJECTIONS",
    "QK_NORMS",
    "add_common_keys",
    "add_head_size",
    "bounded",
    "common_config",
    "float_tensor",
    "has_own_head",
    "rope_config",
    "sliding_note",
    "with_biases",
]

#: Bytes that are compared at a time.
_COMPARED = 1 << 22

#: Around the layers.
DECODER_ROWS = (
    row("token_embd.weight", "embed_tokens.weight"),
    row("output_norm.weight", "norm.weight"),
)
MLP = (
    layer("ffn_gate", "mlp.gate_proj"),
    layer("ffn_up", "mlp.up_proj"),
    layer("ffn_down", "mlp.down_proj"),
)
PROJECTIONS = (
    layer("attn_q", "self_attn.q_proj"),
    layer("attn_k", "self_attn.k_proj"),
    layer("attn_v", "self_attn.v_proj"),
    layer("attn_output", "self_attn.o_proj"),
)
QK_NORMS = (
    layer("attn_q_norm", "self_attn.q_norm"),
    layer("attn_k_norm", "self_attn.k_norm"),
)


def with_biases(rows: tuple[WeightName, ...], *, required: bool = False) -> tuple[WeightName, ...]:
    """Return rows of weights with those of their biases."""
    return tuple(one for weight in rows for one in (weight, bias(weight, required=required)))


def add_common_keys(config: Config, keys: MetadataBuilder) -> None:
    """Add what the runtime asks of every decoder."""
    keys.uint("block_count", config.layers)
    keys.uint("context_length", config.integer("max_position_embeddings"))
    keys.uint("embedding_length", config.integer("hidden_size"))
    keys.uint("feed_forward_length", config.integer("intermediate_size"))
    keys.uint("attention.head_count", config.heads)
    keys.uint("attention.head_count_kv", config.kv_heads)
    keys.float("attention.layer_norm_rms_epsilon", config.number("rms_norm_eps"))
    keys.uint("vocab_size", config.integer("vocab_size"))


def add_head_size(config: Config, keys: MetadataBuilder) -> None:
    """Add the dimensions of a head."""
    keys.uint("attention.key_length", config.head_dim)
    keys.uint("attention.value_length", config.head_dim)


def sliding_note(config: Config, wanted: bool = True) -> list[str]:
    """Say that llama.cpp lets every token see all others, if the model does not."""
    window = config.get("sliding_window")
    if not wanted or not isinstance(window, int) or window <= 0:
        return []
    if window >= config.integer("max_position_embeddings"):
        return []
    return [
        f"the model attends to the last {window} tokens only, and llama.cpp to all: beyond that "
        "length they compute differently"
    ]


def bounded(gguf: GGUFFile, key: str, most: int = 2**31 - 1, default: int | None = None) -> int:
    """Return a positive whole number of a file's metadata.

    Raises
    ------
    InputError
        If it is not one; a number that differs from layer to layer is not, either.
    """
    value = gguf.integer(key, default)
    if not 0 < value <= most:
        raise InputError(f"{key.replace('{arch}', gguf.architecture)} is {value}", path=gguf.path)
    return value


def common_config(gguf: GGUFFile) -> dict[str, Any]:
    """Return the members of ``config.json`` that all decoders have."""
    heads = bounded(gguf, "{arch}.attention.head_count")
    config: dict[str, Any] = {
        "hidden_size": bounded(gguf, "{arch}.embedding_length"),
        "num_hidden_layers": bounded(gguf, "{arch}.block_count", MAX_LAYERS),
        "num_attention_heads": heads,
        "num_key_value_heads": bounded(gguf, "{arch}.attention.head_count_kv", default=heads),
        "intermediate_size": bounded(gguf, "{arch}.feed_forward_length"),
        "max_position_embeddings": bounded(gguf, "{arch}.context_length"),
        "rms_norm_eps": short(gguf.number("{arch}.attention.layer_norm_rms_epsilon")),
        "vocab_size": vocabulary(gguf),
        "tie_word_embeddings": not has_own_head(gguf),
        "hidden_act": "silu",
    }
    config["head_dim"] = bounded(
        gguf, "{arch}.attention.key_length", default=config["hidden_size"] // heads
    )
    values = gguf.integer("{arch}.attention.value_length", config["head_dim"])
    if values != config["head_dim"]:
        raise InputError(
            f"values have {values} dimensions and keys {config['head_dim']}", path=gguf.path
        )
    if f"{gguf.architecture}.expert_count" in gguf.metadata:
        config["experts"] = bounded(gguf, "{arch}.expert_count", MAX_EXPERTS)
    return config


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


def vocabulary(gguf: GGUFFile) -> int:
    """Return how many tokens the embedding has."""
    if "token_embd.weight" not in gguf.tensors or len(gguf.tensors["token_embd.weight"].shape) != 2:
        raise InputError("has no tensor token_embd.weight of two dimensions", path=gguf.path)
    return gguf.tensors["token_embd.weight"].shape[0]


def short(value: float) -> float:
    """Return the shortest decimal that is the same float32: 1e-06, not 9.999999974752427e-07.

    Examples
    --------
    >>> short(9.999999974752427e-07)
    1e-06
    """
    import numpy

    return float(str(numpy.float32(value)))


def float_tensor(gguf: GGUFFile, name: str) -> list[float]:
    """Return the numbers of a small F32 tensor.

    Raises
    ------
    InputError
        If it is none, or has more than 4096 numbers.
    """
    import numpy

    tensor = gguf.tensors[name]
    if tensor.type.name != "F32" or len(tensor.shape) != 1 or tensor.shape[0] > 4096:
        raise InputError(f"tensor {name} is not an F32 vector", path=gguf.path)
    values = numpy.frombuffer(gguf.load(name), dtype="<f4")
    if not numpy.isfinite(values).all():
        raise InputError(f"tensor {name} holds numbers that are not finite", path=gguf.path)
    return [short(value) for value in values]


def rope_config(gguf: GGUFFile, head_dim: int) -> dict[str, Any]:
    """Return ``rope_theta`` and ``rope_scaling``, which every version of transformers reads.

    Raises
    ------
    InputError
        If the file does not tell how it was scaled.
    """
    theta = short(gguf.number("{arch}.rope.freq_base", 10_000.0))
    dimensions = bounded(gguf, "{arch}.rope.dimension_count", default=head_dim)
    found: dict[str, Any] = {"rope_theta": theta}
    if dimensions != head_dim:
        found["partial_rotary_factor"] = dimensions / head_dim
    scaling = _scaling(gguf, theta, dimensions)
    if scaling:
        found["rope_scaling"] = scaling
    return found


def _scaling(gguf: GGUFFile, theta: float, dimensions: int) -> dict[str, Any] | None:
    kind = gguf.text("{arch}.rope.scaling.type", "linear")
    factor = short(
        gguf.number("{arch}.rope.scaling.factor", gguf.number("{arch}.rope.scale_linear", 0.0))
    )
    magnitude = short(gguf.number("{arch}.rope.scaling.attn_factor", 1.0))
    whole = bounded(gguf, "{arch}.context_length")
    context = bounded(gguf, "{arch}.rope.scaling.original_context_length", default=whole)
    if ROPE_FREQUENCIES in gguf.tensors:
        guessed = llama3_parameters(float_tensor(gguf, ROPE_FREQUENCIES), theta, dimensions)
        if guessed is None:
            raise InputError(
                f"its {ROPE_FREQUENCIES} do not tell by which rule they were made",
                path=gguf.path,
                hint="name the model's own config.json with --config",
            )
        return guessed
    if LONG_FACTORS in gguf.tensors and SHORT_FACTORS in gguf.tensors:
        return {
            "rope_type": "longrope",
            "long_factor": float_tensor(gguf, LONG_FACTORS),
            "short_factor": float_tensor(gguf, SHORT_FACTORS),
            "attention_factor": magnitude,
            "original_max_position_embeddings": context,
        }
    if kind == "yarn" and factor:
        scaling = {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": context,
        }
        if magnitude != 1:
            from math import log

            usual = 0.1 * log(factor) + 1 if factor > 1 else 1.0
            scaling["attention_factor"] = magnitude * usual
        return scaling
    if magnitude != 1:
        raise InputError(
            f"scales attention by {magnitude}, which transformers cannot say for RoPE {kind}",
            path=gguf.path,
            hint="name the model's own config.json with --config",
        )
    if kind == "linear" and factor not in (0.0, 1.0):
        return {"rope_type": "linear", "factor": factor}
    if kind not in ("linear", "none", "yarn"):
        raise InputError(f"has RoPE scaling {kind} without its tensors", path=gguf.path)
    return None
