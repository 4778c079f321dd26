"""What transformers leaves dense in a model of 4-bit linears, by model type.

Facts of transformers, held against all of its classes by ``tests/interop/test_every_class.py``.
Tensors of a checkpoint are named here, as well as modules in memory where the two differ.
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["foreign_linears", "heads", "names_part", "plain_linears"]

_CUT = ("q_proj", "k_proj", "v_proj")
#: Ends of names, or parts of them, of linears in layers that transformers cannot hold in 4 bits.
_PLAIN: dict[str, tuple[str, ...]] = {
    # ``_keep_in_fp32_modules`` of their class.
    "blip-2": ("qformer",),
    "deepseek_v4": (
        "compressor.kv_proj", "compressor.gate_proj", "indexer.kv_proj", "indexer.gate_proj",
        "compressor.wkv", "compressor.wgate",
        "o_a_proj", "wo_a",  # a class of its own, for groups of heads
    ),
    **dict.fromkeys(("mt5", "pop2piano", "t5", "udop", "umt5"), ("wo",)),
    # The class around them casts its input to the type of their weight, codes or not.
    **dict.fromkeys(
        ("kosmos-2.5", "longt5", "pix2struct", "pix2struct_text_model", "switch_transformers"),
        ("wo",),
    ),
    # The class around them reads their weight.
    **dict.fromkeys(("gemma3n", "gemma3n_text"), ("correction_coefs", "prediction_coefs")),
    **dict.fromkeys(("falcon_mamba", "jamba", "mamba"), ("dt_proj",)),
    # transformers cuts them into several as it loads them, and would cut the codes.
    "gte": ("qkv_proj", "up_gate_proj", *_CUT, "gate_proj", "up_proj"),
    "hrm_text": ("gqkv_proj", "gate_up_proj", *_CUT, "gate_proj", "up_proj"),
    **dict.fromkeys(("jina_embeddings_v3", "nomic_bert"), ("Wqkv", *_CUT)),
    # Its checkpoints store them as convolutions.
    **dict.fromkeys(("inkling2", "inkling2_text"), ("sconv.weight_proj",)),
    # Inside of its norms.
    "axk2": ("W_down", "W_up", "layernorm.mlp.fc1", "layernorm.mlp.fc2"),
    # It takes the end of this name for that of the tensor.
    **dict.fromkeys(("qwen4_exp", "qwen4_exp_text"), ("block_inject_weight",)),
}  # fmt: skip

#: Classes whose linears, or stacks of experts, are worth 4 bits and are opened by nothing but
#: loraformat: linears of a class of their own, which bitsandbytes does not replace, and rows of
#: experts that transformers interleaves as it loads them.
_FOREIGN: dict[str, tuple[str, ...]] = {
    "falcon": ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
    "ibert": ("query", "key", "value", "dense"),
    **dict.fromkeys(("inkling2", "inkling2_text"), ("experts.gate_up_proj", "experts.w13_weight")),
}

#: Output heads by another name than ``lm_head``. A checkpoint that ties one to its embedding does
#: not name it, and has no 4-bit form of it.
_HEADS: dict[str, str] = {
    **dict.fromkeys(
        ("bert", "big_bird", "deberta", "deberta-v2", "encoder-decoder", "ernie", "fnet",
         "layoutlm", "megatron-bert", "mobilebert", "mra", "nomic_bert", "nystromformer", "rembert",
         "roc_bert", "roformer", "squeezebert", "tapas", "visual_bert", "yoso"),
        "cls.predictions.decoder"),
    "albert": "predictions.decoder",
    "distilbert": "vocab_projector",
    "git": "output",
    "gpt_neox_japanese": "embed_out",
    **dict.fromkeys(("biogpt", "trocr"), "output_projection"),
    **dict.fromkeys(("convbert", "electra"), "generator_lm_head"),
    **dict.fromkeys(("flaubert", "xlm"), "pred_layer.proj"),
    **dict.fromkeys(("modernbert", "modernbert-decoder"), "decoder"),
    "neomme": "unembedding_projection",
    "rwkv": "head",
    "ultrabert": "head.decoder",
    "whisper": "proj_out",
    "xlnet": "lm_loss",
}  # fmt: skip


def plain_linears(types: Iterable[str]) -> tuple[str, ...]:
    """Return what transformers leaves dense in models of these types.

    Examples
    --------
    >>> plain_linears(["t5"]), plain_linears(["llama"])
    (('wo',), ())
    """
    return tuple(name for one in types for name in _PLAIN.get(one, ()))


def foreign_linears(types: Iterable[str]) -> tuple[str, ...]:
    """Return which weights in 4 bits keep transformers from opening models of these types."""
    return tuple(name for one in types for name in _FOREIGN.get(one, ()))


def heads(types: Iterable[str]) -> frozenset[str]:
    """Return the names of output heads of these types, if they are not ``lm_head``."""
    return frozenset(_HEADS[one] for one in types if one in _HEADS)


def names_part(module: str, names: Iterable[str]) -> bool:
    """Tell whether a module is, or is inside of, one of those named.

    Examples
    --------
    >>> names_part("decoder.block.0.layer.1.DenseReluDense.wo", ["wo"])
    True
    >>> names_part("decoder.block.0.layer.1.DenseReluDense.wi", ["wo"])
    False
    """
    return any(f".{name}." in f".{module}." for name in names)
