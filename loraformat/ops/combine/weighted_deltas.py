"""Weighted deltas of several adapters for one target, and their sum, exact or of a given rank.

Σ wᵢ·Bᵢ Aᵢ = [w₁B₁ w₂B₂ …] · [A₁; A₂; …] holds exactly, so no delta is ever formed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy

from loraformat.algebra import lora
from loraformat.algebra.lora import Pair
from loraformat.errors import InputError, UnsupportedError, printable
from loraformat.model.adapter import Adapter, LoraDelta
from loraformat.ops.combine.options import CombineOptions
from loraformat.ops.deltas.factors import load_finite
from loraformat.ops.opening.adapter_weights import effective_scaling

__all__ = ["WeightedDelta", "refuse_dora", "terms_of", "weighted_sum"]

_ROUNDING = 1e-12


@dataclass(frozen=True, slots=True)
class WeightedDelta:
    """One delta in a sum.

    Attributes
    ----------
    adapter : int
        Number of its adapter.
    weight : float
        The user's, times the module's own resolved scaling.
    delta : LoraDelta
    """

    adapter: int
    weight: float
    delta: LoraDelta

    def factors(self) -> Pair:
        """Load B and A, as float32 or wider."""
        return load_finite(self.delta.b), load_finite(self.delta.a)


def terms_of(
    adapters: Sequence[Adapter], weights: Sequence[float], target: str
) -> list[WeightedDelta]:
    """Return the terms of one target, from the adapters that change it.

    Raises
    ------
    InputError
        If two adapters disagree on its dimensions.
    """
    found = [
        WeightedDelta(i, effective_scaling(adapter, target, weight), adapter.deltas[target])
        for i, (adapter, weight) in enumerate(zip(adapters, weights, strict=True))
        if target in adapter.deltas
    ]
    first = found[0]
    for term in found[1:]:
        if _dimensions(term.delta) != _dimensions(first.delta):
            raise InputError(
                f"{printable(target)} is {_dimensions(term.delta)} here and "
                f"{_dimensions(first.delta)} in {printable(adapters[first.adapter].path)}",
                path=adapters[term.adapter].path,
                hint="adapters can only be combined if they are for the same base",
            )
    return found


def _dimensions(delta: LoraDelta) -> tuple[object, ...]:
    experts = delta.a.shape[:-2]
    return (*experts, delta.out_features, delta.in_features, delta.orientation)


def refuse_dora(adapters: Sequence[Adapter]) -> None:
    """Raise for an adapter whose effect is not its delta.

    Raises
    ------
    UnsupportedError
        W' = m · (W + D) / ‖W + D‖ depends on the base: there is nothing to add up.
    """
    for adapter in adapters:
        for delta in adapter.deltas.values():
            if delta.magnitude is not None:
                raise UnsupportedError(
                    f"{printable(delta.target)} has a DoRA magnitude, which depends on the base "
                    "and cannot be combined linearly",
                    path=adapter.path,
                    hint="merge it into its base, extract the difference "
                    "(loraformat merge, then extract), and combine that",
                )


def weighted_sum(
    terms: Sequence[WeightedDelta], options: CombineOptions
) -> tuple[int, float, Callable[[], Pair]]:
    """Plan ``svd``, ``cat`` or ``linear`` of one target.

    Returns the rank of the result, 0 if the terms cancel; the share of the sum's squared norm that
    it holds; and a function that returns B and A.
    """
    if options.method == "cat":
        return sum(term.delta.rank for term in terms), 1.0, lambda: _concatenated(terms)
    b, a = _factors(terms)
    values = lora.pooled(lora.singular_values(b, a))
    # What a sum cancels is zero up to the rounding of what it is a sum of.
    held = int((values > _ROUNDING * numpy.linalg.norm(b) * numpy.linalg.norm(a)).sum())
    largest = max(term.delta.rank for term in terms)
    wanted = options.rank or (largest if options.method == "svd" else held)
    least = int(any(term.delta.bias is not None for term in terms))  # a bias needs a module
    rank = max(min(wanted, held), least)
    total = float((values**2).sum())
    energy = float((values[:rank] ** 2).sum()) / total if total else 1.0
    return rank, energy, lambda: lora.truncate(lora.core(*_factors(terms)), rank, numpy.float64)


def _factors(terms: Sequence[WeightedDelta]) -> Pair:
    return lora.combine_factors([(term.weight, *term.factors()) for term in terms])


def _concatenated(terms: Sequence[WeightedDelta]) -> Pair:
    """Return [f₁·B₁ …] and [2^e₁·A₁ …] with wᵢ = fᵢ·2^eᵢ.

    A power of two changes no digit: A is rounded nowhere, B once, and not at all by weights
    that are powers of two. Half of the exponent goes to either, so that neither overflows.
    """
    left, right = [], []
    for term in terms:
        (b, a), (fraction, exponent) = term.factors(), math.frexp(term.weight)
        left.append(b.astype(numpy.float64) * math.ldexp(fraction, exponent - exponent // 2))
        right.append(a.astype(numpy.float64) * math.ldexp(1.0, exponent // 2))
    return numpy.concatenate(left, -1), numpy.concatenate(right, -2)
