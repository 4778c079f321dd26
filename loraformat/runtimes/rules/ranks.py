"""Rules about the size of the rank."""

from __future__ import annotations

from loraformat.model.adapter_facts import AdapterFacts
from loraformat.runtimes.ranks import is_even_rank
from loraformat.runtimes.record import Rule, Runtime

__all__ = ["RANK_RULES"]


def _limit(adapter: AdapterFacts, runtime: Runtime) -> str | None:
    most = runtime.most or runtime.kernel_rank
    return f"rank {adapter.rank} is above {most}" if most and adapter.rank > most else None


def _set(adapter: AdapterFacts, runtime: Runtime) -> str | None:
    if runtime.even_ranks:
        uneven = [rank for rank in adapter.ranks if not is_even_rank(rank)]
        return f"rank {uneven[0]} is neither 8 nor a multiple of 16" if uneven else None
    default, most = runtime.default_rank, runtime.most
    if default is None or adapter.rank <= default or (most and adapter.rank > most):
        return None
    return f"rank {adapter.rank} is above the default limit of {default}"


RANK_RULES = (
    Rule("RANK_LIMIT", "a rank above the maximum, or above the fast kernels", _limit),
    Rule("RANK_NOT_IN_SET", "a rank that needs an option, or padding", _set),
)
