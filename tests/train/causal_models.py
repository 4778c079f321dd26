"""A tiny model of every class in transformers that predicts text, itself and not what is in it.

As in the zoo of mixtures of experts the classes are asked; `_OF_ITS_OWN` says what is left.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.adapters import moe_models

VOCABULARY = moe_models.VOCABULARY
#: Sizes by names that configs without experts have, and those of what sees or hears.
_SIZES: dict[str, Any] = dict(
    n_embd=64, n_layer=2, n_head=4, n_positions=64, n_inner=96, n_ctx=64, d_model=64, n_layers=2,
    n_heads=4, ffn_dim=96, max_seq_len=64, dff=96, word_embed_proj_dim=64, embedding_size=64,
    decoder_layers=2, encoder_layers=2, decoder_attention_heads=4, encoder_attention_heads=4,
    decoder_ffn_dim=96, encoder_ffn_dim=96, num_encoder_layers=2, num_decoder_layers=2,
    num_encoder_attention_heads=4, num_decoder_attention_heads=4, num_heads=4, rotary_dim=8,
    attention_window=8, state_size=8, emb_dim=64, dim_head=16, dim_ff=96, is_decoder=True,
    laurel_rank=64, altup_num_inputs=2, num_kv_shared_layers=0, global_head_dim=16,
    vocab_size_per_layer_input=VOCABULARY, depth=2, image_size=28, patch_size=14, embed_dim=64,
    num_blocks=2, nemo_conv_channels=16, ext_pw_out_channel=64, out_hidden_size=64,
    shape_vocab_size=64, mtp_num_hidden_layers=0,
)  # fmt: skip
_FOUR_LAYERS = dict(
    num_hidden_layers=4, num_kv_shared_layers=2, hidden_size_per_layer_input=64,
    layer_types=["sliding_attention", "full_attention"] * 2,
)  # fmt: skip
_NO_ROWS = dict(hidden_size_per_layer_input=0, vocab_size_per_layer_input=0)
_ALL_SHARED = dict(
    _NO_ROWS, num_hidden_layers=2, num_kv_shared_layers=2, layer_types=None, enable_moe_block=False
)
_HYBRID = dict(layers_block_type=["linear_attention", "hybrid", "hybrid"], num_hidden_layers=3)
#: What else a type needs; of the parts of a config, by their name.
_OF_ITS_OWN: dict[str, dict[str, Any]] = {
    "blt": dict(encoder_hash_byte_group_vocab=64),
    "cohere_compass_text": dict(rope_parameters=dict(full_attention=dict(
        rope_type="default", rope_theta=10000.0))),
    "dbrx": dict(attn_config=dict(kv_n_heads=2, clip_qkv=8, rope_theta=10000.0),
                 ffn_config=dict(hidden_size=64, ffn_hidden_size=96, moe_top_k=2)),
    "dots3_note": dict(vision_config=dict(adapter_in_dim=64, adapter_out_dim=64),
                       audio_config=dict(adapter_input_size=64, adapter_out_dim=64)),
    "falcon_h1": dict(mamba_d_ssm=128),
    "gemma3n_text": dict(_FOUR_LAYERS, activation_sparsity_pattern=[0.0] * 4),
    "gemma4_assistant": dict(text_config=_ALL_SHARED),
    "gemma4_text": _FOUR_LAYERS,
    "gemma4_unified_assistant": dict(text_config=_ALL_SHARED),
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]]),
    "mamba2": dict(num_heads=8),
    "minicpm3": dict(num_key_value_heads=4),
    "reformer": dict(axial_pos_embds=False, attn_layers=["local", "lsh"], num_hidden_layers=2,
                     feed_forward_size=128, attention_head_size=16, num_buckets=4,
                     local_attn_chunk_length=8, lsh_attn_chunk_length=8),
    "xmod": dict(default_language="en_XX"),
    # transformers zeroes the row of padding of this class as it loads it, whatever the file says.
    "youtu": dict(num_key_value_heads=4, head_dim=8, pad_token_id=None),
    "zamba": _HYBRID,
    "zamba2": _HYBRID,
}  # fmt: skip
#: Without which a config has no defaults.
_FIRST: dict[str, dict[str, Any]] = {
    f"{model_type}_assistant": dict(text_config=dict(model_type=f"{model_type}_text", **_NO_ROWS))
    for model_type in ("gemma4", "gemma4_unified")
}

_OWN_POSITIONS = "counts positions in a way of its own"
_POSITIONS = "its positions do not begin at 0 and skip padding"
_NOT_BY_TRANSFORMERS = (
    "transformers cannot build it: ValueError: Unrecognized configuration class",
    "`AutoModelForCausalLM` does not open what its class saves",
)

#: What training refuses: how the reason begins, and what that means for the documentation.
REFUSED: dict[str, tuple[str, str]] = {
    "blt": (
        "its config (BltConfig) has no num_hidden_layers",
        "it has layers for bytes and for patches, and no one list of them",
    ),
    "emu3": _NOT_BY_TRANSFORMERS,
    "mllama": _NOT_BY_TRANSFORMERS,
    "hrm_text": (
        "its config wants 16 layers, and it holds 2",
        "it computes each layer several times",
    ),
    "inkling2_text": (
        "parameter model.layers.0.mlp.experts.gate_up_proj is made by Interleave",
        "transformers interleaves its experts' rows as it loads them",
    ),
    "longcat_flash": (
        "its config wants 4 layers, and it holds 2",
        "it counts each layer as two",
    ),
    "prophetnet": (
        "ProphetNetForCausalLM computes its logits from more than its last hidden states",
        "it predicts several tokens at once, from streams beside the hidden states",
    ),
    "reformer": (
        "ReformerModelWithLMHead cannot be trained: computed again, layer by layer, its "
        "gradients are not those of plain autograd",
        "its layers are reversible, with a backward pass of their own",
    ),
    "camembert": (f"CamembertForCausalLM {_OWN_POSITIONS}", _POSITIONS),
    "data2vec-text": (f"Data2VecTextForCausalLM {_OWN_POSITIONS}", _POSITIONS),
    "roberta": (f"RobertaForCausalLM {_OWN_POSITIONS}", _POSITIONS),
    "roberta-prelayernorm": (f"RobertaPreLayerNormForCausalLM {_OWN_POSITIONS}", _POSITIONS),
    "xlm-roberta": (f"XLMRobertaForCausalLM {_OWN_POSITIONS}", _POSITIONS),
    "xlm-roberta-xl": (f"XLMRobertaXLForCausalLM {_OWN_POSITIONS}", _POSITIONS),
    "xmod": (f"XmodForCausalLM {_OWN_POSITIONS}", _POSITIONS),
}
_DRAFT = (
    "The set of layer types producing a cache is different",
    "a draft model: it computes with the keys and values of another",
)
_OF_A_PART = (
    "object has no attribute 'dropout'",
    "`AutoModelForCausalLM` builds it of its decoder's config alone",
)

#: What transformers itself cannot build of its config: what it says, and what that means.
NOT_BUILT: dict[str, tuple[str, str]] = {
    "gemma3n": (
        "requires the timm library",
        "what it sees needs the package timm; its text, `gemma3n_text`, is trained",
    ),
    "gemma4_assistant": _DRAFT,
    "gemma4_unified_assistant": _DRAFT,
    "musicgen": _OF_A_PART,
    "musicgen_melody": _OF_A_PART,
}


def model_types() -> list[str]:
    """List the types of causal language models."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def config_of(model_type: str, **sizes: Any) -> Any:
    """Return a tiny config of a model type; `sizes` are others than those here."""
    return _small(CONFIG_MAPPING[model_type](**_FIRST.get(model_type, {})), _SIZES | sizes)


def _small(config: Any, sizes: Mapping[str, Any], changes: Mapping[str, Any] | None = None) -> Any:
    values = _OF_ITS_OWN.get(config.model_type, {}) | dict(changes or {})
    parts = {
        name: _small(part, sizes, values.pop(name, None)) for name, part in vars(config).items()
        if isinstance(part, transformers.PreTrainedConfig)
    }  # fmt: skip
    return type(config)(**moe_models.sizes_of(config, sizes) | parts | values)


def make(model_type: str) -> Any:
    """Return a float32 model with seeded weights, no norm and no bias constant."""
    return moe_models.with_weights(config_of(model_type))
