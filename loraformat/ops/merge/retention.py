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

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import sqrt

import torch

from loraformat.algebra.row_tiles import row_tiles
from loraformat.model.checkpoint import LazyTensor
from loraformat.nf4.kernels.merge_tile import TileSums
from loraformat.ops.merge.tile_threads import TILE_ELEMENTS

__all__ = ["Change", "Meter", "Stored", "Sums", "compared"]

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
class Sums:
    """Sums over elements, from which a `Change` follows."""

    weight: float = 0.0
    delta: float = 0.0
    product: float = 0.0
    error: float = 0.0
    changed: int = 0
    swallowed: int = 0
    clipped: int = 0

    def add(self, other: Sums | TileSums) -> None:
        """Add other sums."""
        self.weight += other.weight
        self.delta += other.delta
        self.product += other.product
        self.error += other.error
        self.changed += other.changed
        self.swallowed += other.swallowed
        self.clipped += other.clipped

    def change(self, name: str) -> Change:
        """Return the figures."""
        return Change(
            name,
            relative=_digits(sqrt(self.delta / self.weight) if self.weight else 0.0),
            gain=_digits(self.product / self.delta if self.delta else 1.0),
            error=_digits(sqrt(self.error / self.delta) if self.delta else 0.0),
            swallowed=_digits(self.swallowed / self.changed if self.changed else 0.0),
            clipped=self.clipped,
        )


def _digits(value: float) -> float:
    """Keep four digits: what two machines agree on."""
    return float(f"{value:.4g}")


@dataclass(slots=True)
class Meter:
    """Collects `Sums` by tensor.

    Attributes
    ----------
    sums : dict of str to Sums
    """

    sums: dict[str, Sums] = field(default_factory=dict)

    def add(self, name: str, sums: TileSums) -> None:
        """Add what `loraformat.nf4.kernels.merge_tile.merge_tile` found."""
        self.sums.setdefault(name, Sums()).add(sums)

    def compare(
        self, name: str, weight: torch.Tensor, wanted: torch.Tensor, result: torch.Tensor
    ) -> None:
        """Measure a whole tensor: what it was, what it should become, what it became."""
        sums = self.sums.setdefault(name, Sums())
        columns = weight.shape[-1]
        flat = [tensor.reshape(-1, columns) for tensor in (weight, wanted, result)]
        for start, stop in row_tiles(len(flat[0]), columns, TILE_ELEMENTS):
            before, exact, after = (tensor[start:stop].float() for tensor in flat)
            sums.add(compared(before, exact, after, before))

    def changes(self) -> list[Change]:
        """Return the figures of every tensor, sorted by name."""
        return [self.sums[name].change(name) for name in sorted(self.sums)]

    def total(self) -> Change:
        """Return the figures of all tensors together."""
        total = Sums()
        for sums in self.sums.values():
            total.add(sums)
        return total.change("total")


def compared(
    weight: torch.Tensor,
    wanted: torch.Tensor,
    result: torch.Tensor,
    untouched: torch.Tensor | None,
) -> TileSums:
    """Measure a piece of a tensor: what it was, what it should become, what it became.

    Parameters
    ----------
    weight, wanted, result : torch.Tensor
        float32, of one shape.
    untouched : torch.Tensor or None
        What it would have become without a change; None where that is not counted.
    """
    delta, effect = wanted - weight, result - weight
    changed, swallowed = _counts(delta, result, untouched)
    product = _dot(effect, delta)
    return TileSums(
        weight=_dot(weight, weight),
        delta=_dot(delta, delta),
        product=product,
        error=_dot(effect.sub_(delta), effect),
        changed=changed,
        swallowed=swallowed,
        clipped=0,
    )


def _counts(
    delta: torch.Tensor, result: torch.Tensor, untouched: torch.Tensor | None
) -> tuple[int, int]:
    """Return how many numbers changed, and how many of them come out as if they had not."""
    if untouched is None:
        return 0, 0
    same = torch.eq(result, untouched).logical_and_(delta)
    return int(torch.count_nonzero(delta)), int(torch.count_nonzero(same))


def _dot(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the sum of products: in float32 of so many that six digits are right."""
    pieces = (torch.split(vector.reshape(-1), _SUMMED) for vector in (one, other))
    return sum(float(torch.dot(a, b)) for a, b in zip(*pieces, strict=True))


class Stored:
    """Measures merged tensors as they are stored; a `loraformat.plugins.RoundingObserver`.

    Parameters
    ----------
    sources : mapping of str to LazyTensor
        What each tensor was before the merge, which changed it by low-rank deltas alone.

    meter : Meter
        Takes what is found.
    """

    def __init__(self, sources: Mapping[str, LazyTensor], meter: Meter) -> None:
        self._sources, self._meter = sources, meter

    def before(self, name: str) -> LazyTensor | None:
        """Return what a tensor was before the merge; None of one that is not measured."""
        return self._sources.get(name)

    def compare(
        self,
        before: torch.Tensor,
        wanted: torch.Tensor,
        stored: torch.Tensor,
        untouched: torch.Tensor | None,
    ) -> object:
        """Measure some numbers; see `loraformat.plugins.RoundingObserver`."""
        return compared(before, wanted, stored, untouched)

    def add(self, name: str, measured: object) -> None:
        """Take what `compare` returned."""
        assert isinstance(measured, TileSums)
        self._meter.add(name, measured)
