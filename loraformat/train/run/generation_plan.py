"""What it takes of memory to let a model write on from a prompt."""

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
    token, and what is let go lies in pieces that are too small for the next. The prompt goes
    through at once: what a layer holds for it, as in a step without gradients.

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
    (22634256, 161403456)
    """
    hidden, tokens = int(config.hidden_size), prompt + new
    cache = 2 * tokens * int(config.num_hidden_layers) * _cached_width(config) * number_bytes
    inside = prompt * (13 * hidden + 5 * inner_width(config)) * number_bytes
    logits = _LOGITS_AT_ONCE * int(config.vocab_size) * _FLOAT
    return cache + inside + logits + _scores(config, prompt, number_bytes)


def inner_width(config: Any) -> int:
    """Return a model's widest feed-forward size.

    Parameters
    ----------
    config : transformers.PretrainedConfig
        Of the language model.
    """
    return _number(config, "intermediate_size") or 4 * int(config.hidden_size)


def _cached_width(config: Any) -> int:
    """Return how many numbers a layer keeps of a token: keys and values of all their heads."""
    hidden = int(config.hidden_size)
    heads = _number(config, "num_attention_heads") or 1
    keys = _number(config, "num_key_value_heads") or heads
    widths = ("head_dim", "global_head_dim", "qk_head_dim", "v_head_dim")
    width = max((_number(config, name) for name in widths), default=0) or -(-hidden // heads)
    return 2 * keys * width


def _scores(config: Any, prompt: int, number_bytes: int) -> int:
    """Return what attention holds of all pairs of tokens, where it computes them all at once."""
    if getattr(config, "_attn_implementation", None) != "eager":
        return prompt * prompt  # a mask
    return (_number(config, "num_attention_heads") or 1) * prompt**2 * 2 * (number_bytes + _FLOAT)


def _number(config: Any, name: str) -> int:
    """Return a size, the largest where each layer has its own; 0 if the config has none."""
    value = getattr(config, name, None)
    return max((n for n in (value if isinstance(value, list | tuple) else [value]) if n), default=0)
