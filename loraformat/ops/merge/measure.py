"""How much of a delta a merge keeps: measured while it is merged.

With the exact change D = g·(w + d) − w and the effective one E = merged − w, of each tensor
and in total:

    relative   ‖D‖ / ‖W‖
    gain       ⟨E, D⟩ / ‖D‖²          1 if nothing is lost on average
    error      ‖E − D‖ / ‖D‖          what rounding adds or takes
    swallowed  share of the changed weights that come out as if there were no adapter; where a
               writer rounds to types of its own, counted on a part of them
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import sqrt

import numpy

from loraformat.model.checkpoint import LazyTensor
from loraformat.nf4.kernels.merge_tile import TileSums
from loraformat.tensors.arrays import Array

__all__ = ["Change", "Meter"]

#: Numbers whose products are summed in float32.
_SUMMED = 1 << 16


@dataclass(frozen=True, slots=True)
class Change:
    """What became of the delta of one tensor, or of all.

    Attributes
    ----------
    name : str
    relative, gain, error, swallowed : float
        See above.
    clipped : int
        Values beyond the range of the output's dtype.
    """

    name: str
    relative: float
    gain: float
    error: float
    swallowed: float
    clipped: int


@dataclass(slots=True)
class Meter:
    """Collects sums over elements by tensor; a `loraformat.plugins.RoundingObserver`.

    Attributes
    ----------
    sources : mapping of str to LazyTensor
        What tensors were before the merge, where a writer rounds to types of its own and tells
        what it stores of them.
    sums : dict of str to TileSums
    """

    sources: Mapping[str, LazyTensor] = field(default_factory=dict)
    sums: dict[str, TileSums] = field(default_factory=dict)

    def before(self, name: str) -> LazyTensor | None:
        """Return what a tensor was before the merge; None of one that the writer does not tell."""
        return self.sources.get(name)

    def compare(
        self, before: Array, wanted: Array, stored: Array, untouched: Array | None
    ) -> TileSums:
        """Measure a piece of a tensor: what it was, what it should become, what it became.

        Parameters
        ----------
        before, wanted, stored : array
            float32, of one shape.
        untouched : array or None
            What it would have become without a change; None where that is not counted.
        """
        delta, effect = wanted - before, stored - before
        changed = swallowed = 0
        if untouched is not None:
            other = delta != 0
            changed, swallowed = int(other.sum()), int((other & (stored == untouched)).sum())
        product = _dot(effect, delta)
        effect -= delta
        weight, change, error = (_dot(values, values) for values in (before, delta, effect))
        return TileSums(weight, change, product, error, changed, swallowed, clipped=0)

    def add(self, name: str, measured: TileSums) -> None:
        """Add what `compare` or `loraformat.nf4.kernels.merge_tile.merge_tile` found."""
        self.sums[name] = _total((self.sums.get(name), measured))

    def changes(self) -> list[Change]:
        """Return the figures of every tensor, sorted by name."""
        return [_change(name, self.sums[name]) for name in sorted(self.sums)]

    def total(self) -> Change:
        """Return the figures of all tensors together."""
        return _change("total", _total(self.sums.values()))


def _total(sums: Iterable[TileSums | None]) -> TileSums:
    return TileSums(*map(sum, zip(*filter(None, sums), strict=True)))


def _change(name: str, sums: TileSums) -> Change:
    return Change(
        name,
        relative=_digits(sqrt(sums.delta / sums.weight) if sums.weight else 0.0),
        gain=_digits(sums.product / sums.delta if sums.delta else 1.0),
        error=_digits(sqrt(sums.error / sums.delta) if sums.delta else 0.0),
        swallowed=_digits(sums.swallowed / sums.changed if sums.changed else 0.0),
        clipped=sums.clipped,
    )


def _digits(value: float) -> float:
    """Keep four digits: what two machines agree on."""
    return float(f"{value:.4g}")


def _dot(one: Array, other: Array) -> float:
    """Return the sum of products: in float32 of so many that six digits are right."""
    flat = one.reshape(-1), other.reshape(-1)
    return sum(
        float(numpy.dot(*(vector[start : start + _SUMMED] for vector in flat)))
        for start in range(0, one.size, _SUMMED)
    )
