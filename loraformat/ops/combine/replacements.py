"""Combination of replaced tensors and rows.

An adapter that puts Wᵢ in the place of W makes the change Wᵢ − W, so a weighted sum makes
Σ wᵢ Wᵢ + (1 − Σ wᵢ) W. Without the base that is known only if the weights of the adapters
which replace the tensor add up to 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy

from loraformat.errors import UnsupportedError, printable
from loraformat.model.adapter import Adapter, RowReplacement
from loraformat.model.checkpoint import DenseTensor
from loraformat.tensors.arrays import array_bytes, numpy_dtype, same_bytes

__all__ = ["combined_replacements", "combined_rows"]

_Holder = tuple[Adapter, float, DenseTensor]


def combined_replacements(
    adapters: Sequence[Adapter], weights: Sequence[float], *, exact: bool
) -> tuple[dict[str, DenseTensor], list[str]]:
    """Return the replaced tensors of the combination, with notes.

    ``exact`` says whether the method is a weighted sum; the others would have to look at the base.

    Raises
    ------
    UnsupportedError
        If there is no such tensor, see above.
    """
    holders: dict[str, list[_Holder]] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for name, tensor in adapter.replacements.items():
            holders.setdefault(name, []).append((adapter, weight, tensor))
    notes: list[str] = []
    combined = {name: _combined(name, held, exact, notes) for name, held in holders.items()}
    return combined, notes


def combined_rows(
    adapters: Sequence[Adapter], weights: Sequence[float], *, exact: bool
) -> tuple[dict[str, RowReplacement], list[str]]:
    """Return the replaced rows of the combination, with notes.

    Raises
    ------
    UnsupportedError
        Also if adapters replace different rows of one tensor.
    """
    found: dict[str, list[tuple[Adapter, float, RowReplacement]]] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for name, rows in adapter.rows.items():
            found.setdefault(name, []).append((adapter, weight, rows))
    notes: list[str] = []
    combined = {}
    for name, parts in found.items():
        first = parts[0][2]
        for adapter, _, rows in parts:
            if rows.indices != first.indices:
                raise UnsupportedError(
                    f"replaces different rows of {printable(name)} than "
                    f"{printable(parts[0][0].path)} does",
                    path=adapter.path,
                    hint=_HINT,
                )
        held = [(adapter, weight, rows.rows) for adapter, weight, rows in parts]
        combined[name] = replace(first, rows=_combined(name, held, exact, notes))
    return combined, notes


_HINT = "merge each adapter into its base, extract the differences, and combine those"


def _combined(name: str, held: list[_Holder], exact: bool, notes: list[str]) -> DenseTensor:
    total = sum(weight for _, weight, _ in held)
    first = held[0][2]
    alike = all(_same(first, tensor) for _, _, tensor in held[1:])
    if alike and all(weight == 1 for _, weight, _ in held):
        if len(held) > 1:
            notes.append(f"{name} is replaced by the same values in {len(held)} adapters: kept")
        return first
    adapter = held[-1][0]
    if not exact or not math.isclose(total, 1, rel_tol=1e-6):
        why = (
            f"the weights of the adapters that replace it sum to {total:g}, not 1"
            if exact
            else "this method needs the base to compute the change"
        )
        raise UnsupportedError(
            f"{printable(name)} is replaced in full, and {why}", path=adapter.path, hint=_HINT
        )
    if any(tensor.shape != first.shape for _, _, tensor in held):
        shapes = " and ".join(sorted({"x".join(map(str, t.shape)) for _, _, t in held}))
        raise UnsupportedError(
            f"{printable(name)} is replaced in full, by tensors of shapes {shapes}",
            path=adapter.path,
            hint=_HINT,
        )
    if len(held) == 1 or alike:
        return first
    notes.append(f"{name} is replaced by the weighted mean of {len(held)} adapters' values")
    return replace(first, load=_mean(held), release=lambda: None)


def _mean(held: list[_Holder]) -> Callable[[], memoryview]:
    def load() -> memoryview:
        total = numpy.zeros(held[0][2].shape, numpy.float32)
        for _, weight, tensor in held:
            part = tensor.array().astype(numpy.float32)
            part *= weight
            total += part
            del part
            tensor.release()
        return array_bytes(total.astype(numpy_dtype(held[0][2].dtype)))

    return load


def _same(one: DenseTensor, other: DenseTensor) -> bool:
    if one is other:
        return True
    alike = (one.dtype, one.shape) == (other.dtype, other.shape)
    return alike and same_bytes(one.load(), other.load())
