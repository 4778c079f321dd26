"""Ranks that servers accept."""

from __future__ import annotations

__all__ = ["VLLM_DEFAULT", "VLLM_RANKS", "even_rank", "vllm_limit"]

#: The values that ``vllm serve --max-lora-rank`` accepts (``MaxLoRARanks``).
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
VLLM_DEFAULT = 16

_SMALLEST, _STEP = 8, 16


def vllm_limit(rank: int) -> int | None:
    """Return the smallest ``--max-lora-rank`` of vLLM that admits a rank; None if none does.

    Examples
    --------
    >>> vllm_limit(8), vllm_limit(20), vllm_limit(513)
    (8, 32, None)
    """
    return next((limit for limit in VLLM_RANKS if rank <= limit), None)


def even_rank(rank: int) -> int:
    """Return the smallest rank from a given one up that needs no padding.

    That is 8, or a multiple of 16: tiles of tensor cores, and LoRAX's kernels.

    Examples
    --------
    >>> even_rank(4), even_rank(8), even_rank(9), even_rank(16), even_rank(40)
    (8, 8, 16, 16, 48)
    """
    return _SMALLEST if rank <= _SMALLEST else -(-rank // _STEP) * _STEP
