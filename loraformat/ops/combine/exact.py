"""The weighted sum of deltas, exact or of a given rank.

Σ wᵢ·Bᵢ Aᵢ = [w₁B₁ w₂B₂ …] · [A₁; A₂; …] holds exactly, so no delta is ever formed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy

from loraformat.algebra import lora
from loraformat.algebra.lora import Pair
from loraformat.ops.combine.options import CombineOptions
from loraformat.ops.combine.weighted_deltas import WeightedDelta

__all__ = ["weighted_sum"]

_ROUNDING = 1e-12


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
