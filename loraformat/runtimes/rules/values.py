"""Rules about the values of tensors."""

from __future__ import annotations

from loraformat.errors import printable
from loraformat.model.adapter_facts import AdapterFacts
from loraformat.model.foreign_adapters import GATHER
from loraformat.runtimes.record import Rule, Runtime, caution, differs, refuses

__all__ = ["VALUE_RULES"]


def _nonfinite(adapter: AdapterFacts, runtime: Runtime) -> str | None:
    if not adapter.nonfinite:
        return None
    more = f" and {len(adapter.nonfinite) - 1} more" if len(adapter.nonfinite) > 1 else ""
    return f"{printable(adapter.nonfinite[0])}{more} holds NaN or infinity"


def _nothing(adapter: AdapterFacts, runtime: Runtime) -> str | None:
    there = adapter.modules or adapter.replaced or adapter.rows or adapter.refusal
    return None if there else "holds no tensors"


def _empty(adapter: AdapterFacts, runtime: Runtime) -> str | None:
    if not adapter.empty:
        return None
    return f"{len(adapter.empty)} tensors are empty ({printable(adapter.empty[0])})"


def _zero(adapter: AdapterFacts, runtime: Runtime) -> str | None:
    whole = [module for module in adapter.modules if not module.missing]
    if (
        not whole
        or adapter.empty
        or adapter.replaced
        or adapter.rows
        or not all(m.zero for m in whole)
    ):
        return None
    return "every B is zero"


VALUE_RULES = (
    Rule(
        "NONFINITE",
        "NaN or infinity",
        _nonfinite,
        differs(
            "most loaders accept them, and every output is NaN", "advice",
            "use an earlier checkpoint: the training diverged, or the file is damaged",
        ),
    ),
    Rule(
        "NO_TENSORS",
        "a file without tensors",
        _nothing,
        differs(
            "it loads but has no effect", "advice",
            f"save it again where it was trained; if that was sharded, {GATHER}",
        ),
    ),
    Rule(
        "EMPTY",
        "tensors of shape [0]",
        _empty,
        refuses(
            "sharded parameters (DeepSpeed ZeRO-3, FSDP) were saved without being gathered",
            "advice",
            GATHER,
        ),
    ),
    Rule(
        "ZERO_DELTA",
        "B of all zeros",
        _zero,
        caution("it has no effect", "advice", "was it saved after training?"),
    ),
)  # fmt: skip
