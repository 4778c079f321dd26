"""Rules about ranks and the scaling of deltas.

Those about scaling are of PEFT directories only: a GGUF file says its scaling itself.
"""

from __future__ import annotations

import math

from loraformat.errors import printable
from loraformat.model.adapter_facts import AdapterFacts
from loraformat.runtimes.ranks import even_rank
from loraformat.runtimes.record import Rule, Runtime

__all__ = ["SCALING_RULES"]


def _off(adapter: AdapterFacts, runtime: Runtime) -> str | None:
    """Say how far off the runtime's scalings are; None if they are right."""
    if adapter.format != "peft":
        return None
    pairs = [(runtime.scaling(adapter, m), m.scaling) for m in adapter.modules if not m.missing]
    wrong = [(got, meant) for got, meant in pairs if not math.isclose(got, meant, rel_tol=1e-6)]
    if not wrong:
        return None
    where = f"in {len(wrong)} of {len(pairs)} modules"
    factors = sorted({got / meant for got, meant in wrong if meant})
    if not factors:
        return f"the delta would act with factor {wrong[0][0]:g} instead of 0 {where}"
    span = f"{factors[0]:.4g}" + (f" to {factors[-1]:.4g}" if factors[-1] != factors[0] else "")
    return f"the delta would be {span} times what it was trained to be {where}"


def _rslora(adapter: AdapterFacts, runtime: Runtime) -> str | None:
    off = _off(adapter, runtime) if adapter.rslora else None
    return f"use_rslora: {off}" if off else None


def _patterns(adapter: AdapterFacts, runtime: Runtime) -> str | None:
    if runtime.one_rank and len(adapter.ranks) > 1:
        return f"modules have ranks {', '.join(map(str, adapter.ranks))}"
    off = _off(adapter, runtime) if adapter.patterns else None
    return f"{' and '.join(adapter.patterns)}: {off}" if off else None


def _zero_alpha(adapter: AdapterFacts, runtime: Runtime) -> str | None:
    off = _off(adapter, runtime) if adapter.config_alpha == 0 else None
    return f"lora_alpha is 0: {off}" if off else None


def _alpha_type(adapter: AdapterFacts, runtime: Runtime) -> str | None:
    alpha = adapter.config_alpha
    if adapter.format != "peft" or alpha is None or (type(alpha) is int and alpha >= 0):
        return None
    return f"lora_alpha is {printable(alpha)} in JSON, which is not a natural number"


def _limit(adapter: AdapterFacts, runtime: Runtime) -> str | None:
    most = runtime.most or runtime.kernel_rank
    return f"rank {adapter.rank} is above {most}" if most and adapter.rank > most else None


def _set(adapter: AdapterFacts, runtime: Runtime) -> str | None:
    if runtime.even_ranks:
        uneven = [rank for rank in adapter.ranks if rank != even_rank(rank)]
        return f"rank {uneven[0]} is neither 8 nor a multiple of 16" if uneven else None
    default, most = runtime.default_rank, runtime.most
    if default is None or adapter.rank <= default or (most and adapter.rank > most):
        return None
    return f"rank {adapter.rank} is above the default limit of {default}"


SCALING_RULES = (
    Rule("RSLORA_IGNORED", "`use_rslora`, where it is ignored", _rslora),
    Rule(
        "PATTERN_IGNORED",
        "`alpha_pattern`, `rank_pattern` or several ranks, where they are ignored",
        _patterns,
    ),
    Rule("ALPHA_ZERO", "`lora_alpha` of 0", _zero_alpha),
    Rule("ALPHA_NOT_INT", "`lora_alpha` with a decimal point", _alpha_type),
    Rule("RANK_LIMIT", "a rank above the maximum, or above the fast kernels", _limit),
    Rule("RANK_NOT_IN_SET", "a rank that needs an option, or padding", _set),
)
