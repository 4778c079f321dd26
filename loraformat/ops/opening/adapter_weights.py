"""Validation of adapter weights given by the user."""

from __future__ import annotations

import math
from collections.abc import Sequence

from loraformat.errors import UsageError, printable
from loraformat.model.adapter import LARGEST_SCALING, Adapter

__all__ = ["adapter_weights", "effective_scaling"]


def adapter_weights(weights: Sequence[float] | None, count: int) -> tuple[float, ...]:
    """Return one factor for each adapter, 1 by default; negative ones subtract.

    Raises
    ------
    UsageError
        If there are no adapters, as many weights as adapters are not given, or one of them is
        NaN or infinite.

    Examples
    --------
    >>> adapter_weights(None, 2), adapter_weights([0.5, -1], 2)
    ((1.0, 1.0), (0.5, -1.0))
    """
    if not count:
        raise UsageError("no adapter given, wanted at least one")
    if not weights:
        return (1.0,) * count
    if len(weights) != count:
        raise UsageError(f"{len(weights)} weights for {count} adapters, wanted one each")
    for weight in weights:
        if not math.isfinite(weight):
            raise UsageError(f"weight {weight} is not a finite number")
    return tuple(float(weight) for weight in weights)


def effective_scaling(adapter: Adapter, target: str, weight: float) -> float:
    """Return the factor of B A, within float32: the user's weight times the module's scaling."""
    scaling = weight * adapter.deltas[target].scaling
    if not abs(scaling) <= LARGEST_SCALING:
        raise UsageError(
            f"weight {weight:g} times the scaling of {printable(target)} exceeds float32",
            hint="give a smaller --weight",
        )
    return scaling
