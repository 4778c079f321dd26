"""Tiny models of many architectures, written by transformers: float32, random, one table for all.

Hyperparameters are chosen so that a mistake shows: heads that do not add up to the hidden
size, few key heads, norms and biases that are not constant, RoPE bases of their own. Tests that
need other sizes ask for them (`resized`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

VOCABULARY = 160
_SIZES: dict[str, Any] = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, vocab_size=VOCABULARY, max_position_embeddings=64, pad_token_id=2,
    bos_token_id=0, eos_token_id=1, rms_norm_eps=1e-5,
)  # fmt: skip
_HEADS = dict(_SIZES, head_dim=24)
_FEW = {name: _SIZES[name] for name in (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")}  # fmt: skip
_EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
_VISION = dict(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    image_size=28, patch_size=14,
)  # fmt: skip
_GEMMA = dict(_HEADS, query_pre_attn_scalar=24, sliding_window=8)
_GEMMA3 = dict(
    _GEMMA, num_hidden_layers=7,
    rope_parameters={
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5},
        "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
    },
)  # fmt: skip
_SHARED_KEYS = dict(
    _HEADS, num_hidden_layers=4, sliding_window=8, num_kv_shared_layers=2,
    layer_types=["sliding_attention", "full_attention"] * 2, hidden_size_per_layer_input=64,
    vocab_size_per_layer_input=VOCABULARY,
)  # fmt: skip
_LONG = [1.0 + i / 4 for i in range(8)]
_SHORT = [1.0] * 4 + [1.5] * 4


def _rope(kind: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e5, **parameters}}


#: Hyperparameters by architecture; the model type is the name up to the first hyphen.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": dict(_HEADS, **_rope("default")),
    "llama-tied": dict(_SIZES, tie_word_embeddings=True),
    "llama-biases": dict(_SIZES, attention_bias=True, mlp_bias=True),
    "llama-3.1": dict(_SIZES, head_dim=64, **_rope(
        "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=8192)),
    "llama-linear": dict(_SIZES, **_rope("linear", factor=4.0)),
    "llama-longrope": dict(_SIZES, **_rope(
        "longrope", short_factor=_SHORT, long_factor=_LONG, factor=2.0,
        original_max_position_embeddings=16)),
    "llama-longrope-short": dict(_SIZES, max_position_embeddings=1024, **_rope(
        "longrope", short_factor=_SHORT, long_factor=_LONG,
        original_max_position_embeddings=512)),
    "llama-odd": dict(_SIZES, intermediate_size=80),
    "mistral": dict(_HEADS, sliding_window=None),
    "mistral-window": dict(_HEADS, sliding_window=8),
    "mixtral": dict(_SIZES, num_local_experts=4, num_experts_per_tok=2),
    "qwen2": dict(_SIZES, tie_word_embeddings=True),
    "qwen2-yarn": dict(_SIZES, **_rope(
        "yarn", factor=4.0, original_max_position_embeddings=16)),
    "qwen2-yarn-loud": dict(_SIZES, **_rope(
        "yarn", factor=4.0, original_max_position_embeddings=16, attention_factor=1.5)),
    "qwen3": _HEADS,
    "qwen3_moe": dict(
        _HEADS, **_EXPERTS, norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[]),
    "gpt_oss": dict(
        _SIZES, head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=8),
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA3,
    "gemma3_text-pattern": dict(
        _GEMMA3, num_hidden_layers=3,
        layer_types=["full_attention", "sliding_attention", "sliding_attention"]),
    "gemma3": dict(
        text_config=_GEMMA3, vision_config=_VISION, mm_tokens_per_image=4, boi_token_index=90,
        eoi_token_index=91, image_token_index=92),
    "gemma3n_text": dict(
        _SHARED_KEYS, altup_num_inputs=2, laurel_rank=64, activation_sparsity_pattern=[0.0] * 4),
    "gemma4_text": dict(_SHARED_KEYS, global_head_dim=24),
    "phi3": dict(_SIZES, original_max_position_embeddings=64),
    "phi3-long": dict(
        _SIZES, original_max_position_embeddings=16, **_rope(
            "longrope", short_factor=[1.0] * 3 + [1.25] * 3, long_factor=_LONG[:6],
            partial_rotary_factor=0.75)),
    "gpt2": dict(
        n_embd=64, n_layer=2, n_head=4, vocab_size=VOCABULARY, n_positions=64, bos_token_id=0,
        eos_token_id=1, n_inner=96),
    "bert": dict(
        _FEW, intermediate_size=96, max_position_embeddings=64, pad_token_id=2),
    "olmo2": _SIZES,
    "granite": dict(
        _SIZES, logits_scaling=8.0, embedding_multiplier=2.0, residual_multiplier=0.5),
    "starcoder2": _SIZES,
    "stablelm": _SIZES,
    "cohere": dict(_SIZES, logit_scale=0.0625),
    "glm": dict(_SIZES, head_dim=16),
    "nemotron": _SIZES,
    "falcon": dict(_FEW, new_decoder_architecture=False, multi_query=True, alibi=False),
    "gpt_neox": _SIZES,
    "phi": _SIZES,
    "opt": dict(
        _FEW, ffn_dim=96, max_position_embeddings=64, word_embed_proj_dim=64, pad_token_id=1),
    "bloom": dict(hidden_size=64, n_layer=2, n_head=4, vocab_size=VOCABULARY),
    "nanochat": _SIZES,
    "electra": dict(_SIZES, embedding_size=64, is_decoder=True),
    "roberta": dict(_SIZES, is_decoder=True),
    "lfm2": dict(_SIZES, layer_types=["conv", "full_attention"]),
    "mamba": dict(hidden_size=64, num_hidden_layers=2, vocab_size=VOCABULARY, state_size=8),
}  # fmt: skip
#: Sizes whose rows are multiples of 64: bitsandbytes on a CPU decodes others wrongly, its own, too.
WIDE = dict(
    intermediate_size=128, moe_intermediate_size=64, n_inner=128, head_dim=16,
    query_pre_attn_scalar=16,
)  # fmt: skip


def resized(name: str, **sizes: Any) -> dict[str, Any]:
    """Return hyperparameters with other values for those that the architecture has."""

    def fitted(part: dict[str, Any]) -> dict[str, Any]:
        return part | {key: value for key, value in sizes.items() if key in part}

    values = fitted(ARCHITECTURES[name])
    inner = values.get("text_config")
    return values if inner is None else {**values, "text_config": fitted(inner)}


def model_type(name: str) -> str:
    return name.partition("-")[0]


def auto_class(name: str) -> Any:
    special = {
        "bert": transformers.AutoModel,
        "gemma3": transformers.AutoModelForImageTextToText,
    }
    return special.get(model_type(name), transformers.AutoModelForCausalLM)


def build(
    name: str,
    values: dict[str, Any] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> Any:
    """Return a model of an architecture, with the table's hyperparameters or these values."""
    found = {**(ARCHITECTURES[name] if values is None else values), **changes}
    config = transformers.AutoConfig.for_model(model_type(name), **found)
    return auto_class(name).from_config(config, dtype=dtype)


def make_model(
    name: str,
    directory: Path,
    values: dict[str, Any] | None = None,
    *,
    std: float | None = None,
    **changes: Any,
) -> Path:
    """Write a model with seeded weights in which no norm and no bias is constant."""
    if std is None:
        # llama.cpp looks GELU up in a table of float16: smaller sums, smaller errors
        std = 0.04 if "gemma" in name else 0.08
    torch.manual_seed(0)
    model = build(name, values, **changes)
    for key, parameter in model.named_parameters():
        if parameter.ndim == 1:
            plain = "norm" in key.lower() or ".ln_" in key
            torch.nn.init.normal_(parameter, mean=float(plain), std=0.1)
        elif "router" in key or key.endswith("gate.weight"):
            torch.nn.init.normal_(parameter, std=0.3)
        else:
            torch.nn.init.normal_(parameter, std=std)
    model.save_pretrained(directory)
    return directory
