"""A tiny model of every class in transformers that has a mixture of experts and writes text.

Nothing here lists them: the classes are asked. Sizes are set by the names that configs share, and
`_OF_ITS_OWN` says what is left.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

VOCABULARY = 128
EXPERTS = 4
TOKENS = torch.arange(3, 19).view(2, 8)
_SIZES: dict[str, Any] = dict(
    vocab_size=VOCABULARY, hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=64,
    pad_token_id=0, bos_token_id=1, eos_token_id=2, sliding_window=8,
    # experts
    num_experts=EXPERTS, num_local_experts=EXPERTS, n_routed_experts=EXPERTS, num_experts_per_tok=2,
    moe_num_experts=EXPERTS, moe_k=2, moe_topk=2, n_group=1, topk_group=1, n_shared_experts=1,
    first_k_dense_replace=1, num_dense_layers=1, moe_intermediate_size=32, zero_expert_num=1,
    shared_expert_intermediate_size=32, shared_intermediate_size=32, expert_ffn_hidden_size=32,
    moe_shared_expert_intermediate_size=32, ffn_hidden_size=48, top_k_experts=2,
    # latent attention, indexers, linear attention
    q_lora_rank=32, kv_lora_rank=32, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16,
    index_head_dim=16, index_n_heads=2, index_topk=4, o_lora_rank=8, o_groups=2,
    linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=16,
    linear_value_head_dim=16, linear_num_heads=4, linear_head_dim=16, mamba_d_state=8,
    mamba_num_heads=4, mamba_head_dim=16, mamba_n_heads=8, mamba_d_head=16, ssm_state_size=8,
    n_groups=1, indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=16, indexer_budget=4,
    indexer_compress_ratio=2, hidden_size_per_layer_input=0,
)  # fmt: skip
_LATENT = dict(num_key_value_heads=4, head_dim=8)
_LINEAR = dict(layer_types=["linear_attention", "full_attention"])
_OF_ITS_OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        ("axk1", "axk2", "bailing_hybrid", "deepseek_v2", "deepseek_v3", "deepseek_v32",
         "dots3_note_text", "glm4_moe_lite", "glm_moe_dsa", "longcat_flash"), _LATENT),
    **dict.fromkeys(("minimax", "qwen3_5_moe_text", "qwen3_next"), _LINEAR),
    "doge": dict(is_moe=True, num_experts=16),
    "flint": dict(mlp_only_layers=[0]),
    "gemma4_text": dict(enable_moe_block=True, num_kv_shared_layers=0),
    "granitemoehybrid": dict(layer_types=["mamba", "attention"]),
    "jamba": dict(
        attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1
    ),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"]),
    "zaya": dict(num_experts_per_tok=1),
}  # fmt: skip


def _fields(model_type: str) -> dict[str, Any]:
    found: dict[str, Any] = CONFIG_MAPPING[model_type]().to_dict()
    return found


@functools.cache
def model_types() -> list[str]:
    """List the types of causal language models whose config speaks of experts."""
    found = []
    for model_type in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        if model_type in CONFIG_MAPPING:
            config_class = CONFIG_MAPPING[model_type]
            inner = config_class.sub_configs.get("text_config", config_class)
            names = " ".join(inspect.signature(inner).parameters)
            if "expert" in names or "moe" in names:
                found.append(model_type)
    return found


def config_of(model_type: str, **changes: Any) -> Any:
    """Return a tiny config of a model type, itself or of the language model in it."""
    fields = _fields(model_type)
    if isinstance(inner := fields.get("text_config"), dict):
        return config_of(inner["model_type"], **changes)
    config_class = CONFIG_MAPPING[model_type]
    return config_class(**sizes_of(config_class()) | changes)


def sizes_of(config: Any, more: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the sizes that make a config of a class tiny; `more` are names besides those here."""
    fields = config.to_dict()
    known = fields.keys() | getattr(config, "attribute_map", {}).keys()
    values = {name: value for name, value in (_SIZES | dict(more or {})).items() if name in known}
    for name in ("layer_types", "mlp_layer_types"):
        if fields.get(name):
            values[name] = [fields[name][0], fields[name][-1]]
    return values | _OF_ITS_OWN.get(config.model_type, {})


def make(model_type: str, **changes: Any) -> Any:
    """Return a float32 model with seeded weights, no norm and no bias constant."""
    return with_weights(config_of(model_type, **changes))


def with_weights(config: Any) -> Any:
    """Return the model of a config as `make` does."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean = 1.0 if "norm" in name and parameter.ndim == 1 else 0.0
            parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.1 + mean)
    return model.eval().requires_grad_(False)


def logits(model: Any) -> torch.Tensor:
    """Return the logits of a few tokens."""
    with torch.no_grad():
        found: torch.Tensor = model(TOKENS, use_cache=False).logits
    return found
