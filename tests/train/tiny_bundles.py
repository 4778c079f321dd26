"""Tiny models of many architectures as bundles, and the dense model that each stands for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from loraformat.ops.convert.convert import convert

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

VOCABULARY = 160
_COMMON: dict[str, Any] = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, vocab_size=VOCABULARY, max_position_embeddings=64, pad_token_id=2,
    bos_token_id=0, eos_token_id=1,
)  # fmt: skip
_HEADS = dict(_COMMON, head_dim=24)
_GPT = dict(
    n_embd=64, n_layer=2, n_head=4, vocab_size=VOCABULARY, n_positions=64, bos_token_id=0,
    eos_token_id=1,
)  # fmt: skip
_EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)

#: Hyperparameters by architecture; the model type is the name up to the first hyphen.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": dict(_HEADS, tie_word_embeddings=False),
    "llama-tied": dict(_COMMON, tie_word_embeddings=True),
    "mistral": dict(_HEADS, sliding_window=8),
    "qwen2": _COMMON,
    "qwen3": _HEADS,
    "gemma2": dict(_HEADS, query_pre_attn_scalar=24, sliding_window=8),
    "gemma3_text": dict(
        _HEADS, num_hidden_layers=3, query_pre_attn_scalar=24, sliding_window=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "phi3": dict(_COMMON, original_max_position_embeddings=64),
    "gpt2": dict(_GPT, n_inner=96),
    "mixtral": dict(_COMMON, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": dict(
        _HEADS, **_EXPERTS, norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[]
    ),
    "gpt_oss": dict(
        _COMMON, head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=8
    ),
    "olmo2": _COMMON,
    "granite": dict(
        _COMMON, logits_scaling=8.0, embedding_multiplier=2.0, residual_multiplier=0.5
    ),
    "starcoder2": _COMMON,
    "stablelm": _COMMON,
    "cohere": dict(_COMMON, logit_scale=0.0625),
    "glm": dict(_COMMON, head_dim=16),
    "nemotron": _COMMON,
    "falcon": dict(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=VOCABULARY,
        new_decoder_architecture=False, multi_query=True, alibi=False,
    ),
    "gpt_neox": _COMMON,
    "phi": _COMMON,
    "opt": dict(
        hidden_size=64, ffn_dim=96, num_hidden_layers=2, num_attention_heads=4,
        vocab_size=VOCABULARY, max_position_embeddings=64, word_embed_proj_dim=64, pad_token_id=1,
    ),
    "bloom": dict(hidden_size=64, n_layer=2, n_head=4, vocab_size=VOCABULARY),
    "gemma3n_text": dict(
        _HEADS, num_hidden_layers=4, sliding_window=8, num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2, hidden_size_per_layer_input=64,
        vocab_size_per_layer_input=VOCABULARY, altup_num_inputs=2, laurel_rank=64,
        activation_sparsity_pattern=[0.0] * 4,
    ),
    "gemma4_text": dict(
        _HEADS, num_hidden_layers=4, sliding_window=8, num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2, hidden_size_per_layer_input=64,
        vocab_size_per_layer_input=VOCABULARY, global_head_dim=24,
    ),
    "nanochat": _COMMON,
    "electra": dict(_COMMON, embedding_size=64, is_decoder=True),
    "roberta": dict(_COMMON, is_decoder=True),
    "lfm2": dict(_COMMON, layer_types=["conv", "full_attention"]),
    "mamba": dict(hidden_size=64, num_hidden_layers=2, vocab_size=VOCABULARY, state_size=8),
}  # fmt: skip


def make_dense(directory: Path, architecture: str, **changes: Any) -> Path:
    """Write a float32 model with seeded weights in which no norm and no bias is constant."""
    torch.manual_seed(0)
    values = {**ARCHITECTURES[architecture], **changes}
    config = transformers.AutoConfig.for_model(architecture.split("-")[0], **values)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            spread = 0.3 if "router" in name or name.endswith("gate.weight") else 0.08
            torch.nn.init.normal_(parameter, std=spread)
        else:
            plain = "norm" in name or ".ln_" in name
            torch.nn.init.normal_(parameter, mean=float(plain), std=0.1)
    model.save_pretrained(directory)
    return directory


def make(directory: Path, architecture: str = "llama", **options: Any) -> Path:
    """Write a bundle of a tiny model, and return its path.

    ``directory/dense`` is what it was quantized from, ``directory/stored`` the dense float32
    model whose weights are exactly those that the bundle's codes stand for.
    """
    make_dense(directory / "dense", architecture)
    convert(directory / "dense", directory / "bundle", **options)
    convert(directory / "bundle", directory / "stored", to_format="safetensors", dtype="f32")
    return directory / "bundle"


def stored_model(bundle: Path, attention: str = "eager") -> Any:
    """Return the dense float32 model that a bundle stands for, in evaluation mode."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        bundle.parent / "stored", dtype=torch.float32, attn_implementation=attention,
        experts_implementation="eager",
    )  # fmt: skip
    return model.eval().requires_grad_(False)
