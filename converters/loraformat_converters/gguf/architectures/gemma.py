"""The gemma2 and gemma3 (text) architectures.

Norms scale by 1 + w, and llama.cpp stores the sum. It scales attention by the root of the
head's dimensions, or, in the 27B models, of hidden size over heads: no key says so, the
number of layers decides. A config with another ``query_pre_attn_scalar`` cannot run. gemma3 may
have an output head of its own; gemma2 computes with its embedding, whatever the file holds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loraformat.errors import InputError, UnsupportedError
from loraformat_converters.gguf.architectures.config import Config
from loraformat_converters.gguf.architectures.decoder import (
    MLP,
    PROJECTIONS,
    add_common_keys,
    add_head_size,
    bounded,
    common_config,
    rope_config,
    short,
)
from loraformat_converters.gguf.architectures.keys import MetadataBuilder
from loraformat_converters.gguf.architectures.names import layer, plus_one, row
from loraformat_converters.gguf.architectures.record import Architecture
from loraformat_converters.gguf.architectures.rope import Rope

if TYPE_CHECKING:
    from loraformat_converters.gguf.container import GGUFFile

__all__ = ["GEMMA2", "GEMMA3"]

_ROWS = (
    row("token_embd.weight", "embed_tokens.weight"),
    row("output_norm.weight", "norm.weight", plus_one),
    layer("attn_norm", "input_layernorm", plus_one),
    layer("post_attention_norm", "post_attention_layernorm", plus_one),
    layer("ffn_norm", "pre_feedforward_layernorm", plus_one),
    layer("post_ffw_norm", "post_feedforward_layernorm", plus_one),
    *PROJECTIONS,
    *MLP,
)
_QK_NORMS = (
    layer("attn_q_norm", "self_attn.q_norm", plus_one),
    layer("attn_k_norm", "self_attn.k_norm", plus_one),
)
#: Layers of the models that scale attention in the other way.
_LAYERS_OF_27B = {"gemma2": 46, "gemma3": 62}
_SLIDING, _FULL = "sliding_attention", "full_attention"


def _scalar(architecture: str, layers: int, hidden: int, heads: int, head_dim: int) -> int:
    """Return the query_pre_attn_scalar that llama.cpp computes with."""
    return hidden // heads if layers == _LAYERS_OF_27B[architecture] else head_dim


def _check_scalar(config: Config, architecture: str) -> None:
    runs = _scalar(
        architecture, config.layers, config.integer("hidden_size"), config.heads, config.head_dim
    )
    said = config.number("query_pre_attn_scalar")
    if said != runs:
        raise UnsupportedError(
            f"query_pre_attn_scalar is {said:g}, and llama.cpp computes with {runs} for a model "
            "of this shape; GGUF has no key for it"
        )


def _gemma_keys(config: Config, keys: MetadataBuilder) -> None:
    config.only(
        "hidden_activation", "gelu_pytorch_tanh", "gelu_new", "gelu", None,
        why="llama.cpp computes with gelu",
    )  # fmt: skip
    config.only("attention_bias", False, None, why="llama.cpp has no biases here")
    config.only("use_bidirectional_attention", False, None, why="llama.cpp looks back only")
    _check_scalar(config, keys.architecture)
    add_common_keys(config, keys)
    add_head_size(config, keys)


def _pattern(config: Config, every: int) -> list[bool]:
    """Return which layers have sliding attention."""
    layers = config.layers
    kinds = config.get("layer_types")
    if kinds is None:
        step = config.integer("sliding_window_pattern", every)
        return [bool((number + 1) % step) for number in range(layers)]
    known = isinstance(kinds, list) and all(kind in (_SLIDING, _FULL) for kind in kinds)
    if not known or len(kinds) != layers:
        raise InputError(f"layer_types is not a list of {layers} known kinds", path="config.json")
    return [kind == _SLIDING for kind in kinds]


def _add_window(config: Config, keys: MetadataBuilder, every: int) -> None:
    sliding = _pattern(config, every)
    keys.uint("attention.sliding_window", config.integer("sliding_window"))
    if sliding != [bool((number + 1) % every) for number in range(config.layers)]:
        keys.flags("attention.sliding_window_pattern", sliding)


def _gemma2_keys(config: Config, keys: MetadataBuilder) -> None:
    _gemma_keys(config, keys)
    Rope(config, kinds=("linear",)).add_keys(keys)
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        keys.float(key, config.number(key))
    _add_window(config, keys, 2)


def _gemma3_keys(config: Config, keys: MetadataBuilder) -> None:
    _gemma_keys(config, keys)
    config.only("attn_logit_softcapping", None, why="llama.cpp has none in gemma3")
    Rope(config, kinds=("linear",), theta=1e6, layer_type=_FULL).add_keys(keys)
    local = Config(
        {**config.values, "rope_scaling": None, "rope_theta": config.get("rope_local_base_freq")},
        {},
    )
    keys.float("rope.freq_base_swa", Rope(local, theta=1e4, layer_type=_SLIDING).theta)
    if config.get("final_logit_softcapping") is not None:
        keys.float("final_logit_softcapping", config.number("final_logit_softcapping"))
    _add_window(config, keys, 6)


def _common(gguf: GGUFFile, every: int) -> dict[str, Any]:
    config = common_config(gguf)
    config.pop("hidden_act")
    config |= rope_config(gguf, config["head_dim"])
    scalar = _scalar(
        gguf.architecture,
        config["num_hidden_layers"],
        config["hidden_size"],
        config["num_attention_heads"],
        config["head_dim"],
    )
    return {
        **config,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": scalar,
        "attention_bias": False,
        "layer_types": _layer_types(gguf, config["num_hidden_layers"], every),
    }


def _layer_types(gguf: GGUFFile, layers: int, every: int) -> list[str]:
    key = f"{gguf.architecture}.attention.sliding_window_pattern"
    stored = gguf.metadata.get(key)
    if stored is not None and stored.item_type is not None:
        sliding = [bool(value) for value in gguf.array(key)]
        if len(sliding) != layers:
            raise InputError(f"{key} has {len(sliding)} items for {layers} layers", path=gguf.path)
    else:
        step = bounded(gguf, key, default=every)
        sliding = [number % step < step - 1 for number in range(layers)]
    return [_SLIDING if one else _FULL for one in sliding]


def _gemma2_config(gguf: GGUFFile) -> dict[str, Any]:
    return {
        **_common(gguf, 2),
        "model_type": "gemma2",
        "sliding_window": bounded(gguf, "{arch}.attention.sliding_window", default=4096),
        "attn_logit_softcapping": short(gguf.number("{arch}.attn_logit_softcapping", 50.0)),
        "final_logit_softcapping": short(gguf.number("{arch}.final_logit_softcapping", 30.0)),
    }


def _gemma3_config(gguf: GGUFFile) -> dict[str, Any]:
    window = gguf.integer("{arch}.attention.sliding_window", 0)
    config = _common(gguf, 6)
    softcap = short(gguf.number("{arch}.final_logit_softcapping", 0.0))
    if window <= 0:  # every layer sees everything
        config["layer_types"] = [_FULL] * config["num_hidden_layers"]
    return {
        **config,
        "model_type": "gemma3_text",
        "sliding_window": max(window, 1),
        "rope_local_base_freq": short(gguf.number("{arch}.rope.freq_base_swa", 10_000.0)),
        "attn_logit_softcapping": None,
        "final_logit_softcapping": softcap or None,
    }


_COMMON: dict[str, Any] = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}

GEMMA2 = Architecture(
    name="gemma2",
    models={"gemma2": "Gemma2ForCausalLM"},
    defaults={
        "gemma2": {
            **_COMMON,
            "vocab_size": 256000,
            "max_position_embeddings": 8192,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        }
    },
    rows=lambda config: _ROWS,
    keys=_gemma2_keys,
    config=_gemma2_config,
    head=None,
)
GEMMA3 = Architecture(
    name="gemma3",
    models={"gemma3_text": "Gemma3ForCausalLM", "gemma3": "Gemma3ForCausalLM"},
    defaults={
        model_type: {**_COMMON, "vocab_size": 262208, "max_position_embeddings": 131072}
        for model_type in ("gemma3_text", "gemma3")
    },
    rows=lambda config: (*_ROWS, *_QK_NORMS),
    keys=_gemma3_keys,
    config=_gemma3_config,
    bases=("model.", "language_model.model.", "model.language_model.", ""),
)
