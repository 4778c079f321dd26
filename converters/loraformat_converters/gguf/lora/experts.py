"""Experts' gate and up deltas: two pairs in GGUF, one fused parameter in PEFT.

[B_g A_g; B_u A_u] is one delta of the same rank if both have one A, as files have that were
made of such a parameter. Else it is one of the rank r_g + r_u: A stacked, B block-diagonal.
Both are exact.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy

from loraformat.model.adapter import LoraDelta
from loraformat.model.checkpoint import DenseTensor
from loraformat.tensors.arrays import Array, array_bytes, numpy_dtype

__all__ = ["fused"]


def fused(module: str, parts: Mapping[int, LoraDelta]) -> LoraDelta:
    """Return the delta of ``gate_up_proj`` from those of its halves, 0 and 1; one may be missing.

    Parameters
    ----------
    module : str
        The parameter.
    parts : mapping of int to LoraDelta
        Factors with three dimensions.
    """
    gate, up = parts.get(0), parts.get(1)
    if gate is None or up is None:
        return _alone(module, gate or up)
    dtype = gate.b.dtype if gate.b.dtype == up.b.dtype == gate.a.dtype else "F32"
    experts, rows, width = gate.b.shape[0], gate.b.shape[1] + up.b.shape[1], gate.a.shape[-1]
    same = gate.a.shape == up.a.shape and gate.a.dtype == up.a.dtype
    if same and gate.a.load() == up.a.load():
        kind = gate.b.dtype if gate.b.dtype == up.b.dtype else "F32"
        b = _lazy(gate.b.name, kind, (experts, rows, gate.rank), lambda: _joined(gate.b, up.b))
        return replace(gate, target=module, b=b)
    rank = gate.rank + up.rank
    equal = gate.scaling == up.scaling
    dtype = dtype if equal else "F32"
    a = _lazy(gate.a.name, dtype, (experts, rank, width), lambda: _joined(gate.a, up.a))
    b = _lazy(gate.b.name, dtype, (experts, rows, rank), lambda: _blocks(gate, up, equal))
    scaling = gate.scaling if equal else 1.0
    return LoraDelta(module, a, b, scaling, alpha=scaling * rank)


def _alone(module: str, half: LoraDelta | None) -> LoraDelta:
    """Fill the other half with zeros."""
    assert half is not None
    first = ".ffn_gate" in half.b.name
    experts, rows, rank = half.b.shape

    def load() -> Array:
        whole = numpy.zeros((experts, 2 * rows, rank), numpy_dtype(half.b.dtype))
        (whole[:, :rows] if first else whole[:, rows:])[...] = half.b.array()
        return whole

    b = _lazy(half.b.name, half.b.dtype, (experts, 2 * rows, rank), load)
    return replace(half, target=module, b=b)


def _joined(upper: DenseTensor, lower: DenseTensor) -> Array:
    """Return the rows of both, expert by expert."""
    return numpy.concatenate(_of_one_type(upper.array(), lower.array()), 1)


def _blocks(gate: LoraDelta, up: LoraDelta, equal: bool) -> Array:
    upper, lower = gate.b.array(), up.b.array()
    if equal:
        upper, lower = _of_one_type(upper, lower)
    else:
        upper = upper.astype(numpy.float64) * gate.scaling
        lower = lower.astype(numpy.float64) * up.scaling
    experts, rows = upper.shape[0], upper.shape[1] + lower.shape[1]
    whole = numpy.zeros((experts, rows, gate.rank + up.rank), upper.dtype)
    whole[:, : upper.shape[1], : gate.rank] = upper
    whole[:, upper.shape[1] :, gate.rank :] = lower
    return whole


def _of_one_type(one: Array, other: Array) -> tuple[Array, Array]:
    """Return both in the type of both, else in float32, which holds either exactly."""
    if one.dtype == other.dtype:
        return one, other
    return one.astype(numpy.float32), other.astype(numpy.float32)


def _lazy(name: str, dtype: str, shape: tuple[int, ...], make: Callable[[], Array]) -> DenseTensor:
    def load() -> memoryview:
        with numpy.errstate(over="ignore"):
            return array_bytes(make().astype(numpy_dtype(dtype), copy=False))

    return DenseTensor(name, dtype, shape, load)
