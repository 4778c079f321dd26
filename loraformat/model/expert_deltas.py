"""Deltas of experts: of each by itself, of all as one stack, and of gate and up together.

A stack has factors (experts, rank, in) and (experts, out, rank). [B_g A_g; B_u A_u] is one delta
of the same rank if both have one A, as files have that were made of a fused parameter. Else it is
one of the rank r_g + r_u: A stacked, B block-diagonal. Both are exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy

from loraformat.model.adapter import LoraDelta
from loraformat.model.checkpoint import DenseTensor
from loraformat.tensors.arrays import Array, array_bytes, numpy_dtype

__all__ = ["apart", "fused", "repeated", "stacked"]


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
        return _alone(module, parts)
    dtype = gate.b.dtype if gate.b.dtype == up.b.dtype == gate.a.dtype else "F32"
    experts, rows, width = gate.b.shape[0], gate.b.shape[1] + up.b.shape[1], gate.a.shape[-1]
    same = gate.a.shape == up.a.shape and gate.a.dtype == up.a.dtype
    equal = gate.scaling == up.scaling
    if same and equal and gate.a.load() == up.a.load():
        kind = gate.b.dtype if gate.b.dtype == up.b.dtype else "F32"
        b = _lazy(gate.b.name, kind, (experts, rows, gate.rank), lambda: _joined(gate.b, up.b))
        return replace(gate, target=module, b=b)
    rank = gate.rank + up.rank
    dtype = dtype if equal else "F32"
    a = _lazy(gate.a.name, dtype, (experts, rank, width), lambda: _joined(gate.a, up.a))
    b = _lazy(gate.b.name, dtype, (experts, rows, rank), lambda: _blocks(gate, up, equal))
    scaling = gate.scaling if equal else 1.0
    return LoraDelta(module, a, b, scaling, alpha=scaling * rank)


def _alone(module: str, parts: Mapping[int, LoraDelta]) -> LoraDelta:
    """Fill the other half with zeros."""
    ((number, half),) = parts.items()
    experts, rows, rank = half.b.shape

    def load() -> Array:
        whole = numpy.zeros((experts, 2 * rows, rank), numpy_dtype(half.b.dtype))
        whole[:, number * rows : (number + 1) * rows] = half.b.array()
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


def stacked(target: str, members: Mapping[int, LoraDelta], experts: int) -> LoraDelta:
    """Return the deltas of single experts as one, with zeros where one has none or a lower rank.

    The factors keep their dtype; B becomes float32 if the scalings differ, which are folded then.
    """
    deltas = list(members.values())
    first, rank = deltas[0], max(delta.rank for delta in deltas)
    equal = len({delta.scaling for delta in deltas}) == 1
    types = {tensor.dtype for delta in deltas for tensor in (delta.a, delta.b)}
    dtype = types.pop() if len(types) == 1 else "F64" if "F64" in types else "F32"
    b_dtype = dtype if equal or dtype == "F64" else "F32"

    def load_a() -> Array:
        whole = numpy.zeros((experts, rank, first.in_features), numpy_dtype(dtype))
        for number, delta in members.items():
            whole[number, : delta.rank] = delta.a.array()
        return whole

    def load_b() -> Array:
        whole = numpy.zeros((experts, first.out_features, rank), numpy_dtype(b_dtype))
        for number, delta in members.items():
            values = delta.b.array()
            if not equal:
                values = values.astype(numpy.float64) * delta.scaling
            whole[number, :, : delta.rank] = values
        return whole

    def release() -> None:
        for delta in deltas:
            delta.a.release()
            delta.b.release()

    scaling = first.scaling if equal else 1.0
    a = _lazy(first.a.name, dtype, (experts, rank, first.in_features), load_a, release)
    b = _lazy(first.b.name, b_dtype, (experts, first.out_features, rank), load_b, release)
    return LoraDelta(target, a, b, scaling, alpha=scaling * rank)


def repeated(delta: LoraDelta, experts: int) -> LoraDelta:
    """Return a stack of which one factor, (1, ...), or both were stored once for all experts."""

    def of_all(tensor: DenseTensor) -> DenseTensor:
        shape = (experts, *tensor.shape[1:])
        if tensor.shape == shape:
            return tensor
        load = lambda: numpy.broadcast_to(tensor.array(), shape)  # noqa: E731
        return _lazy(tensor.name, tensor.dtype, shape, load, tensor.release)

    return replace(delta, a=of_all(delta.a), b=of_all(delta.b))


def apart(delta: LoraDelta, tensors: Sequence[Sequence[str]]) -> Iterator[LoraDelta]:
    """Yield the deltas of single experts that a stack consists of, exactly.

    ``tensors`` are by expert the names of what lies one below the other in the stack: those of gate
    and up share the stack's A. A stack is loaded once for all that are read in this order.
    """
    a, b = _Loaded(delta.a), _Loaded(delta.b)
    rows = delta.out_features // len(tensors[0])
    for expert, names in enumerate(tensors):
        for part, name in enumerate(names):
            last = expert == len(tensors) - 1 and part == len(names) - 1
            own = slice(part * rows, (part + 1) * rows)
            yield replace(
                delta,
                target=name,
                a=a.slice(name, (expert, slice(None)), (delta.rank, delta.in_features), last),
                b=b.slice(name, (expert, own), (rows, delta.rank), last),
                second_moment=None,
            )


class _Loaded:
    """The array of a stack, kept from the first of its slices to the release of the last."""

    def __init__(self, tensor: DenseTensor) -> None:
        self._tensor = tensor
        self._array: Array | None = None

    def slice(
        self, name: str, index: tuple[int, slice], shape: tuple[int, int], last: bool
    ) -> DenseTensor:
        def load() -> Array:
            if self._array is None:
                self._array = self._tensor.array()
            return numpy.ascontiguousarray(self._array[index])

        def release() -> None:
            if last:
                self._array = None
                self._tensor.release()

        return _lazy(f"{name} ({self._tensor.name})", self._tensor.dtype, shape, load, release)


def _nothing() -> None:
    pass


def _lazy(
    name: str,
    dtype: str,
    shape: tuple[int, ...],
    make: Callable[[], Array],
    release: Callable[[], None] = _nothing,
) -> DenseTensor:
    def load() -> memoryview:
        with numpy.errstate(over="ignore"):
            return array_bytes(make().astype(numpy_dtype(dtype), copy=False))

    return DenseTensor(name, dtype, shape, load, release)
