"""The gemma2 and gemma3 (text) architectures.

Norms scale by 1 + w, and llama.cpp stores the sum. It scales attention by the root of the
head's dimensions, or, in the 27B models, of hidden size over heads: no key says so, the
number of layers decides. A config with another ``query_pre_attn_scalar`` cannot run. gemma3 may
have an output head of its own; gemma2 computes with its embedding, whatever the file holds.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from loraformat.errors import InputError, UnsupportedError
from loraformat_converters.gguf.architectures.config import Config
from loraformat_converters.gguf.architectures.decoder import (
    AROUND,
    COMMON_KEYS,
    HEAD_SIZE,
    MLP,
    PROJECTIONS,
    QK_NORMS,
)
from loraformat_converters.gguf.architectures.metadata import (
    MetadataBuilder,
    MetadataRow,
    bounded,
    number,
    only,
    short,
)
from loraformat_converters.gguf.architectures.record import Architecture
from loraformat_converters.gguf.architectures.rope import Rope, rope_keys
from loraformat_converters.gguf.architectures.weights import layer, plus_one

if TYPE_CHECKING:
    from loraformat_converters.gguf.container.reader import GGUFFile

__all__ = ["GEMMA2", "GEMMA3"]

_SLIDING, _FULL = "sliding_attention", "full_attention"


def _scalar(layers_of_27b: int) -> MetadataRow:
    """Return the row of ``query_pre_attn_scalar``, which llama.cpp tells by the shape."""

    def runs(layers: int, hidden: int, heads: int, head_dim: int) -> int:
        return hidden // heads if layers == layers_of_27b else head_dim

    def write(config: Config, keys: MetadataBuilder) -> None:
        computed = runs(config.layers, config.hidden, config.heads, config.head_dim)
        said = config.number("query_pre_attn_scalar")
        if said != computed:
            raise UnsupportedError(
                f"query_pre_attn_scalar is {said:g}, and llama.cpp computes with {computed} for a "
                "model of this shape; GGUF has no key for it"
            )

    def read(gguf: GGUFFile, members: dict[str, Any]) -> None:
        sizes = ("num_hidden_layers", "hidden_size", "num_attention_heads", "head_dim")
        members["query_pre_attn_scalar"] = runs(*(members[size] for size in sizes))

    return MetadataRow(write, read)


def _window(every: int, default: int | None) -> MetadataRow:
    """Return the row of sliding attention.

    Of so many layers the last one sees everything, in the models that llama.cpp knows; others have
    a list of their layers. The default is the window of a file that has none; None if all its
    layers see everything then.
    """

    def write(config: Config, keys: MetadataBuilder) -> None:
        sliding = _pattern(config, every)
        keys.uint("attention.sliding_window", config.integer("sliding_window"))
        if sliding != [bool((number + 1) % every) for number in range(config.layers)]:
            keys.flags("attention.sliding_window_pattern", sliding)

    def read(gguf: GGUFFile, members: dict[str, Any]) -> None:
        key = "{arch}.attention.sliding_window"
        known = default is not None
        window = bounded(gguf, key, default=default) if known else gguf.integer(key, 0)
        kinds = _layer_types(gguf, members["num_hidden_layers"], every)
        members["layer_types"] = kinds if window > 0 else [_FULL] * len(kinds)
        members["sliding_window"] = max(window, 1)

    return MetadataRow(write, read)


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


def _gemma3_rope(config: Config) -> Rope:
    return Rope(config, theta=1e6, kinds=("linear",), layer_type=_FULL)


def _write_local_base(config: Config, keys: MetadataBuilder) -> None:
    local = Config(
        {**config.values, "rope_scaling": None, "rope_theta": config.get("rope_local_base_freq")},
        {},
    )
    keys.float("rope.freq_base_swa", Rope(local, theta=1e4, layer_type=_SLIDING).theta)


def _read_local_base(gguf: GGUFFile, members: dict[str, Any]) -> None:
    members["rope_local_base_freq"] = short(gguf.number("{arch}.rope.freq_base_swa", 10_000.0))


_REFUSED = (
    only(
        "hidden_activation", "gelu_pytorch_tanh", "gelu_new", "gelu", None,
        why="llama.cpp computes with gelu",
    ),
    only("attention_bias", False, None, why="llama.cpp has no biases here"),
    only(
        "use_bidirectional_attention", False, None, why="llama.cpp looks back only", implied=False
    ),
)  # fmt: skip
_WEIGHTS = (
    AROUND[0],
    replace(AROUND[1], transform=plus_one),
    layer("attn_norm", "input_layernorm", "hidden", plus_one),
    layer("post_attention_norm", "post_attention_layernorm", "hidden", plus_one),
    layer("ffn_norm", "pre_feedforward_layernorm", "hidden", plus_one),
    layer("post_ffw_norm", "post_feedforward_layernorm", "hidden", plus_one),
    *PROJECTIONS,
    *MLP,
)
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
    keys=(
        *_REFUSED,
        *COMMON_KEYS,
        HEAD_SIZE,
        _scalar(layers_of_27b=46),
        rope_keys(lambda config: Rope(config, kinds=("linear",))),
        number("attn_logit_softcapping", "attn_logit_softcapping", 50.0),
        number("final_logit_softcapping", "final_logit_softcapping", 30.0),
        _window(every=2, default=4096),
    ),
    weights=_WEIGHTS,
    head=None,
)
GEMMA3 = Architecture(
    name="gemma3",
    models={"gemma3_text": "Gemma3ForCausalLM", "gemma3": "Gemma3ForCausalLM"},
    defaults={
        model_type: {**_COMMON, "vocab_size": 262208, "max_position_embeddings": 131072}
        for model_type in ("gemma3_text", "gemma3")
    },
    keys=(
        *_REFUSED,
        *COMMON_KEYS,
        HEAD_SIZE,
        _scalar(layers_of_27b=62),
        only("attn_logit_softcapping", None, why="llama.cpp has none in gemma3"),
        rope_keys(_gemma3_rope),
        MetadataRow(_write_local_base, _read_local_base),
        number("final_logit_softcapping", "final_logit_softcapping", optional=True),
        _window(every=6, default=None),
    ),
    weights=(*_WEIGHTS, *(replace(norm, transform=plus_one) for norm in QK_NORMS)),
    bases=("model.", "language_model.model.", "model.language_model.", ""),
)
