"""Facts about an adapter that a converter has read, for formats without ``examine``."""

from __future__ import annotations

from loraformat.errors import FileChangedError, InputError
from loraformat.model.adapter import Adapter, LoraDelta
from loraformat.model.adapter_facts import AdapterFacts, ModuleFacts
from loraformat.model.checkpoint import Checkpoint, DenseTensor

__all__ = ["facts_of", "is_zero"]


def facts_of(adapter: Adapter, base: Checkpoint | None = None) -> AdapterFacts:
    """Collect an adapter's facts, reading all its tensors once.

    `base` is the one against which it was read.
    """
    nonfinite: list[str] = []
    modules = tuple(_module(delta, base, nonfinite) for delta in adapter.deltas.values())
    for tensor in (*adapter.replacements.values(), *(row.rows for row in adapter.rows.values())):
        is_zero(tensor, nonfinite)
    task = adapter.config.get("task_type")
    biases = any(name.endswith(".bias") for name in adapter.replacements)
    return AdapterFacts(
        format=adapter.format,
        modules=modules,
        replaced=tuple(adapter.replacements),
        rows=tuple(adapter.rows),
        task=task if isinstance(task, str) else None,
        last_token=max((n for row in adapter.rows.values() for n in row.indices), default=None),
        invocation_tokens=bool(adapter.invocation_tokens),
        dora=any(module.dora for module in modules),
        bias=biases or any(module.bias for module in modules),
        nonfinite=tuple(nonfinite),
        base_model=adapter.base_model,
        base_fingerprint=adapter.base_fingerprint,
    )


def _module(delta: LoraDelta, base: Checkpoint | None, nonfinite: list[str]) -> ModuleFacts:
    zero = is_zero(delta.b, nonfinite)
    is_zero(delta.a, nonfinite)
    stored = base.tensors.get(delta.target) if base is not None else None
    return ModuleFacts(
        name=delta.target.removesuffix(".weight"),
        rank=delta.rank,
        in_features=delta.in_features,
        out_features=delta.out_features,
        alpha=delta.alpha,
        scaling=delta.scaling,
        dtypes=(delta.a.dtype, delta.b.dtype),
        dora=delta.magnitude is not None,
        bias=delta.bias is not None,
        experts=delta.a.shape[0] if len(delta.a.shape) == 3 else 0,
        zero=zero,
        base_shape=stored.shape if stored is not None else None,
    )


def is_zero(tensor: DenseTensor, nonfinite: list[str]) -> bool:
    """Tell whether all values are zero; add the name of a tensor with NaN or infinity to a list."""
    try:
        return not tensor.array().any()
    except FileChangedError:
        raise
    except InputError:  # NaN or infinity
        nonfinite.append(tensor.name)
        return False
    finally:
        tensor.release()
