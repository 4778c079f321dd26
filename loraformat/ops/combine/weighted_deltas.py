"""Weighted deltas of several adapters for one target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loraformat.algebra.lora import Pair
from loraformat.errors import InputError, UnsupportedError, printable
from loraformat.model.adapter import Adapter, LoraDelta
from loraformat.ops.deltas.factors import load_finite
from loraformat.ops.opening.adapter_weights import effective_scaling

__all__ = ["WeightedDelta", "refuse_dora", "terms_of"]


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
