"""The memory that text generation takes: keys and values, activations of the prompt, logits."""

from __future__ import annotations

from typing import Any

__all__ = ["generation_bytes", "inner_width"]

_FLOAT = 4
#: Tensors of the size of the logits while the next token is chosen: as they come, as float32, and
#: what the choice is made from.
_LOGITS_AT_ONCE = 4


def generation_bytes(config: Any, prompt: int, new: int, number_bytes: int = _FLOAT) -> int:
    """Return a bound on what one continuation holds, besides the weights.

    Keys and values of all layers for prompt and new tokens, twice: they grow by a copy for each
    token, and what is let go lies in pieces that are too small for the next. One layer's at a time
    are there for each of the heads that share them. The prompt goes through at once: what a layer
    holds for it, as in a step without gradients.

    Parameters
    ----------
    config : transformers.PretrainedConfig
        Of the language model.
    prompt, new : int
        Tokens.
    number_bytes : int
        Of one number in an activation.

    Examples
    --------
    >>> import transformers
    >>> config = transformers.LlamaConfig(
    ...     hidden_size=512, intermediate_size=1408, num_hidden_layers=12, vocab_size=64000,
    ...     num_attention_heads=8,
    ... )
    >>> generation_bytes(config, 100, 64), generation_bytes(config, 1000, 64)
    (23306000, 165761600)
    """
    hidden, tokens = _attention_width(config), prompt + new
    cache = 2 * tokens * int(config.num_hidden_layers) * _cached_width(config) * number_bytes
    inside = prompt * (13 * hidden + 5 * inner_width(config)) * number_bytes
    repeated = 2 * tokens * hidden * number_bytes
    logits = _LOGITS_AT_ONCE * int(config.vocab_size) * _FLOAT
    return cache + repeated + inside + logits + _scores(config, prompt, number_bytes)


def inner_width(config: Any) -> int:
    """Return a model's widest feed-forward size.

    Parameters
    ----------
    config : transformers.PretrainedConfig
        Of the language model.
    """
    return _number(config, "intermediate_size") or 4 * int(config.hidden_size)


def _cached_width(config: Any) -> int:
    """Return how many numbers a layer keeps of a token.

    Keys and values of all their heads, or what both are computed from (latent attention).
    """
    heads = _number(config, "num_key_value_heads") or _number(config, "num_attention_heads") or 1
    if latent := _number(config, "kv_lora_rank"):
        return latent + _number(config, "qk_rope_head_dim")
    shared = getattr(config, "multi_query", False)  # by all heads, but for Falcon's newer models
    if shared and not getattr(config, "new_decoder_architecture", False):
        heads = 1
    return 2 * heads * _head_width(config)


def _attention_width(config: Any) -> int:
    """Return the widest of what goes through a layer besides its feed-forward part."""
    heads = _number(config, "num_attention_heads") or 1
    return max(int(config.hidden_size), heads * _head_width(config))


def _head_width(config: Any) -> int:
    """Return the widest head's size."""
    heads = _number(config, "num_attention_heads") or 1
    names = ("head_dim", "global_head_dim", "qk_head_dim", "v_head_dim")
    widest = max(_number(config, name) for name in names)
    return widest or -(-int(config.hidden_size) // heads)


def _scores(config: Any, prompt: int, number_bytes: int) -> int:
    """Return what attention holds of all pairs of tokens, where it computes them all at once."""
    if getattr(config, "_attn_implementation", None) != "eager":
        return prompt * prompt  # a mask
    return (_number(config, "num_attention_heads") or 1) * prompt**2 * 2 * (number_bytes + _FLOAT)


def _number(config: Any, name: str) -> int:
    """Return a size, the largest where each layer has its own; 0 if the config has none."""
    value = getattr(config, name, None)
    return max((n for n in (value if isinstance(value, list | tuple) else [value]) if n), default=0)
