"""Padding of an adapter to one rank and to all layers, with zeros.

With A (r, in) and B (out, r), and zeros below A and beside B up to rank R, B' A' = B A in every
bit that a sum of zeros leaves alone. A runtime that knows one rank and one scaling is right about
such an adapter once its scaling is folded into B.

Some runtimes want a type of module adapted in every layer or in none, or v_proj wherever there is
q_proj. Where the base's weights are known, what is missing is there, and zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy

from loraformat.errors import UnsupportedError, printable
from loraformat.families.tensor_names import type_of
from loraformat.model.adapter import Adapter, LoraDelta
from loraformat.model.checkpoint import Checkpoint, DenseTensor
from loraformat.runtimes.ranks import even_rank
from loraformat.tensors.arrays import array_bytes, numpy_dtype
from loraformat.tensors.dtypes import ITEM_BYTES

__all__ = ["with_one_rank"]

_MERGE = "merge it: loraformat merge BASE ADAPTER -o MERGED"


def with_one_rank(adapter: Adapter, base: Checkpoint | None = None) -> Adapter:
    """Return an adapter with the same deltas, padded to one rank that kernels support.

    That is the largest rank, brought up to 8 or a multiple of 16. Factors of float64 become
    float32, rounded to nearest even, as runtimes know no wider type. Weights of the ``base``
    against which it was read get a delta of zero where others of their type have one.

    Raises
    ------
    UnsupportedError
        If it is more than low-rank deltas, which no form of an adapter makes right everywhere.
    """
    _refuse_more(adapter)
    rank = even_rank(max((delta.rank for delta in adapter.deltas.values()), default=1))
    deltas = {name: _padded(delta, rank) for name, delta in adapter.deltas.items()}
    if base is not None:
        deltas |= {delta.target: delta for delta in _missing(deltas, base, rank)}
    return replace(adapter, deltas=deltas, verbatim=False)


def _missing(deltas: Mapping[str, LoraDelta], base: Checkpoint, rank: int) -> Iterator[LoraDelta]:
    """Yield a zero delta for each missing weight of an adapted type, and for v next to q."""
    types = {type_of(target): delta for target, delta in deltas.items()}
    for kind, delta in list(types.items()):
        if kind.endswith("q_proj.weight"):
            types.setdefault(kind[: -len("q_proj.weight")] + "v_proj.weight", delta)
    for name, stored in base.tensors.items():
        like = types.get(type_of(name))
        if like is not None and name not in deltas and len(stored.shape) == 2:
            shape = stored.shape if like.orientation == "linear" else stored.shape[::-1]
            yield _zero(name, like, shape, rank)


def _zero(target: str, like: LoraDelta, shape: tuple[int, ...], rank: int) -> LoraDelta:
    rows, columns = shape
    return replace(
        like,
        target=target,
        a=_zeros(target, like.a.dtype, (rank, columns)),
        b=_zeros(target, like.b.dtype, (rows, rank)),
        scaling=1.0,
        alpha=float(rank),
        second_moment=None,
    )


def _zeros(name: str, dtype: str, shape: tuple[int, int]) -> DenseTensor:
    nbytes = shape[0] * shape[1] * ITEM_BYTES[dtype]
    return DenseTensor(name, dtype, shape, lambda: memoryview(bytes(nbytes)))


def _refuse_more(adapter: Adapter) -> None:
    deltas = adapter.deltas.values()
    reasons = {
        "is active only after certain tokens (aLoRA)": bool(adapter.invocation_tokens),
        "uses DoRA": any(delta.magnitude is not None for delta in deltas),
        "holds biases": any(delta.bias is not None for delta in deltas)
        or any(name.endswith(".bias") for name in adapter.replacements),
        f"replaces {printable(next(iter(adapter.replacements), ''))}": bool(adapter.replacements),
        f"replaces rows of {printable(next(iter(adapter.rows), ''))}": bool(adapter.rows),
    }
    for reason, found in reasons.items():
        if found:
            raise UnsupportedError(
                f"{reason}, which no adapter format represents correctly in every runtime",
                path=adapter.path,
                hint="use it in PEFT, unmerged" if adapter.invocation_tokens else _MERGE,
            )


def _padded(delta: LoraDelta, rank: int) -> LoraDelta:
    leading = delta.a.shape[:-2]
    moment = delta.second_moment
    return replace(
        delta,
        a=_zero_padded(delta.a, (*leading, rank, delta.in_features)),
        b=_zero_padded(delta.b, (*leading, delta.out_features, rank)),
        second_moment=_zero_padded(moment, (rank, rank)) if moment is not None else None,
    )


def _zero_padded(tensor: DenseTensor, shape: Sequence[int]) -> DenseTensor:
    """Return a tensor padded with zeros at the end of each dimension."""
    dtype = "F32" if tensor.dtype == "F64" else tensor.dtype
    if tensor.shape == tuple(shape) and dtype == tensor.dtype:
        return tensor

    def load() -> memoryview:
        whole = numpy.zeros(shape, numpy_dtype(dtype))
        whole[tuple(map(slice, tensor.shape))] = tensor.array()
        return array_bytes(whole)

    return DenseTensor(tensor.name, dtype, tuple(shape), load, tensor.release)
