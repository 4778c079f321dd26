"""One rank for all modules: rows and columns of zeros, which change no product.

With A (r, in) and B (out, r), and zeros below A and beside B up to rank R, B' A' = B A in every
bit that a sum of zeros leaves alone. A runtime that knows one rank and one scaling is right about
such an adapter once its scaling is folded into B.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from loraformat.adapter import Adapter, LoraDelta
from loraformat.checkpoint import DenseTensor, tensor_view
from loraformat.errors import UnsupportedError, printable
from loraformat.runtimes.ranks import even_rank

__all__ = ["with_one_rank"]

_MERGE = "merge it: loraformat merge BASE ADAPTER -o MERGED"


def with_one_rank(adapter: Adapter) -> Adapter:
    """Return an adapter of the same deltas, all of one rank that kernels take as it is.

    That is the largest rank, brought up to 8 or a multiple of 16. Factors of float64 become
    float32, rounded to nearest even, as runtimes know no wider type.

    Parameters
    ----------
    adapter : Adapter

    Raises
    ------
    UnsupportedError
        If it is more than low-rank deltas, which no form of an adapter makes right everywhere.
    """
    _refuse_more(adapter)
    rank = even_rank(max((delta.rank for delta in adapter.deltas.values()), default=1))
    deltas = {name: _padded(delta, rank) for name, delta in adapter.deltas.items()}
    return replace(adapter, deltas=deltas, verbatim=False)


def _refuse_more(adapter: Adapter) -> None:
    deltas = adapter.deltas.values()
    reasons = {
        "acts from certain tokens on (aLoRA)": bool(adapter.invocation_tokens),
        "uses DoRA": any(delta.magnitude is not None for delta in deltas),
        "holds biases": any(delta.bias is not None for delta in deltas)
        or any(name.endswith(".bias") for name in adapter.replacements),
        f"replaces {printable(next(iter(adapter.replacements), ''))}": bool(adapter.replacements),
        f"replaces rows of {printable(next(iter(adapter.rows), ''))}": bool(adapter.rows),
    }
    for reason, found in reasons.items():
        if found:
            raise UnsupportedError(
                f"{reason}, which no form of an adapter makes right in every runtime",
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
    """Return a tensor with zeros behind its own numbers, in every dimension that grew."""
    dtype = "F32" if tensor.dtype == "F64" else tensor.dtype
    if tensor.shape == tuple(shape) and dtype == tensor.dtype:
        return tensor

    def load() -> memoryview:
        import torch

        from loraformat.dtypes import torch_dtype

        whole = torch.zeros(tuple(shape), dtype=torch_dtype(dtype))
        inner = tuple(slice(0, size) for size in tensor.shape)
        whole[inner] = tensor_view(tensor.load(), tensor.dtype, tensor.shape).to(whole.dtype)
        data: Any = whole.view(-1).view(torch.uint8).numpy()
        return memoryview(data)

    return DenseTensor(tensor.name, dtype, tuple(shape), load, tensor.release)
