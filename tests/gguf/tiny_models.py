"""Tiny models of every architecture that GGUF knows, written by transformers, float32, random.

Hyperparameters are chosen so that a mistake shows: heads that do not add up to the hidden
size, few key heads, norms and biases that are not constant, RoPE bases of their own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

VOCABULARY = 2048  # that of the small model's tokenizer
_COMMON: dict[str, Any] = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, vocab_size=VOCABULARY, max_position_embeddings=64, pad_token_id=2,
    bos_token_id=0, eos_token_id=1, rms_norm_eps=1e-5,
)  # fmt: skip
_HEADS = dict(_COMMON, head_dim=24)
_VISION = dict(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    image_size=28, patch_size=14,
)  # fmt: skip
_GEMMA3 = dict(
    _HEADS, num_hidden_layers=7, query_pre_attn_scalar=24, sliding_window=8,
    rope_parameters={
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5},
        "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
    },
)  # fmt: skip
_LONG = [1.0 + i / 4 for i in range(8)]
_PATTERN = ["full_attention", "sliding_attention", "sliding_attention"]


def _rope(kind: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e5, **parameters}}


#: By name: model type, its hyperparameters.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", dict(_HEADS, **_rope("default"))),
    "llama-tied": ("llama", dict(_COMMON, tie_word_embeddings=True)),
    "llama-biases": ("llama", dict(_COMMON, attention_bias=True, mlp_bias=True)),
    "llama-3.1": ("llama", dict(_COMMON, head_dim=64, **_rope(
        "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=8192))),
    "llama-linear": ("llama", dict(_COMMON, **_rope("linear", factor=4.0))),
    "llama-longrope": ("llama", dict(_COMMON, **_rope(
        "longrope", short_factor=[1.0] * 4 + [1.5] * 4, long_factor=_LONG,
        original_max_position_embeddings=16, factor=2.0))),
    "llama-longrope-short": ("llama", dict(_COMMON, max_position_embeddings=1024, **_rope(
        "longrope", short_factor=[1.0] * 4 + [1.5] * 4, long_factor=_LONG,
        original_max_position_embeddings=512))),
    "odd": ("llama", dict(_COMMON, intermediate_size=80)),
    "mistral": ("mistral", dict(_HEADS, sliding_window=None)),
    "mixtral": ("mixtral", dict(_COMMON, num_local_experts=4, num_experts_per_tok=2)),
    "qwen2": ("qwen2", dict(_COMMON, tie_word_embeddings=True)),
    "qwen2-yarn": ("qwen2", dict(_COMMON, **_rope(
        "yarn", factor=4.0, original_max_position_embeddings=16))),
    "qwen2-yarn-loud": ("qwen2", dict(_COMMON, **_rope(
        "yarn", factor=4.0, original_max_position_embeddings=16, attention_factor=1.5))),
    "qwen3": ("qwen3", _HEADS),
    "qwen3_moe": ("qwen3_moe", dict(
        _HEADS, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
        norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[])),
    "gemma2": ("gemma2", dict(_HEADS, query_pre_attn_scalar=24, sliding_window=8)),
    "gemma3_text": ("gemma3_text", _GEMMA3),
    "gemma3-pattern": ("gemma3_text", dict(
        _GEMMA3, num_hidden_layers=3, layer_types=_PATTERN)),
    "gemma3": ("gemma3", dict(
        text_config=_GEMMA3, vision_config=_VISION, mm_tokens_per_image=4, boi_token_index=90,
        eoi_token_index=91, image_token_index=92)),
    "phi3": ("phi3", dict(_COMMON, original_max_position_embeddings=64)),
    "phi3-long": ("phi3", dict(
        _COMMON, original_max_position_embeddings=16, **_rope(
            "longrope", short_factor=[1.0] * 3 + [1.25] * 3, long_factor=_LONG[:6],
            partial_rotary_factor=0.75))),
    "gpt2": ("gpt2", dict(
        n_embd=64, n_layer=2, n_head=4, vocab_size=VOCABULARY, n_positions=64, bos_token_id=0,
        eos_token_id=1, n_inner=96)),
    "bert": ("bert", dict(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        vocab_size=VOCABULARY, max_position_embeddings=64, pad_token_id=2)),
}  # fmt: skip


def auto_class(model_type: str) -> Any:
    special = {
        "bert": transformers.AutoModel,
        "gemma3": transformers.AutoModelForImageTextToText,
    }
    return special.get(model_type, transformers.AutoModelForCausalLM)


def make_model(name: str, directory: Path) -> Path:
    """Write a model to a directory."""
    model_type, values = MODELS[name]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **values)
    model = auto_class(model_type).from_config(config, dtype=torch.float32)
    for key, parameter in model.named_parameters():
        if parameter.ndim == 1:  # biases and norms begin constant
            plain = "norm" in key.lower() or ".ln_" in key
            torch.nn.init.normal_(parameter, mean=float(plain), std=0.1)
        elif "router" in key or key.endswith("gate.weight"):
            torch.nn.init.normal_(parameter, std=0.3)
        else:
            # llama.cpp looks GELU up in a table of float16: smaller sums, smaller errors
            torch.nn.init.normal_(parameter, std=0.04 if "gemma" in name else 0.08)
    model.save_pretrained(directory)
    return directory
