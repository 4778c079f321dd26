"""How much of a delta a merge keeps: measured while it is merged.

With the exact change D = g·(w + d) − w and the effective one E = merged − w, of each tensor
and in total:

    relative   ‖D‖ / ‖W‖
    gain       ⟨E, D⟩ / ‖D‖²          1 if nothing is lost on average
    error      ‖E − D‖ / ‖D‖          what rounding adds or takes
    swallowed  share of the changed weights that come out as if there were no adapter
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import sqrt

import torch

__all__ = ["Change", "Meter", "Sums", "measure_tile"]

#: Elements up to which a tile is measured as a whole.
_MEASURED_ELEMENTS = 1 << 15
_FLOAT16_MAX = 65504.0


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
    effect: float = 0.0
    changed: int = 0
    swallowed: int = 0
    clipped: int = 0

    def add(self, other: Sums, share: float = 1.0) -> None:
        """Add other sums that stand for ``share`` times as many elements."""
        self.weight += share * other.weight
        self.delta += share * other.delta
        self.product += share * other.product
        self.effect += share * other.effect
        self.changed += round(share * other.changed)
        self.swallowed += round(share * other.swallowed)
        self.clipped += other.clipped

    def change(self, name: str) -> Change:
        """Return the figures."""
        rest = max(self.effect - 2 * self.product + self.delta, 0.0)
        return Change(
            name,
            relative=_digits(sqrt(self.delta / self.weight) if self.weight else 0.0),
            gain=_digits(self.product / self.delta if self.delta else 1.0),
            error=_digits(sqrt(rest / self.delta) if self.delta else 0.0),
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

    def add(self, name: str, sums: Sums) -> None:
        """Add what `measure_tile` found."""
        self.sums.setdefault(name, Sums()).add(sums)

    def compare(
        self, name: str, weight: torch.Tensor, wanted: torch.Tensor, result: torch.Tensor
    ) -> None:
        """Measure a whole tensor: what it was, what it should become, what it became."""
        sums = self.sums.setdefault(name, Sums())
        for before, exact, after in zip(weight, wanted, result, strict=True):
            delta = exact.float() - before.float()
            sums.add(_measure(before.float(), delta, None, after.float()))

    def changes(self) -> list[Change]:
        """Return the figures of every tensor, sorted by name."""
        return [self.sums[name].change(name) for name in sorted(self.sums)]

    def total(self) -> Change:
        """Return the figures of all tensors together."""
        total = Sums()
        for sums in self.sums.values():
            total.add(sums)
        return total.change("total")


def measure_tile(
    weight: torch.Tensor, delta: torch.Tensor, gain: torch.Tensor | None, merged: torch.Tensor
) -> Sums:
    """Measure a tile, of large ones every 16th row."""
    step = min(16, len(weight)) if weight.numel() >= _MEASURED_ELEMENTS else 1
    own = gain if gain is None or len(gain) == 1 else gain[::step]
    part = _measure(weight[::step].float(), delta[::step], own, merged[::step])
    if merged.dtype == torch.float16 and step > 1:
        part.clipped = int((merged.abs() >= _FLOAT16_MAX).sum())
    sums = Sums()
    sums.add(part, len(weight) / len(weight[::step]))
    return sums


def _measure(
    weight: torch.Tensor, delta: torch.Tensor, gain: torch.Tensor | None, merged: torch.Tensor
) -> Sums:
    exact = delta.expand_as(weight) if gain is None else (weight + delta) * gain - weight
    effect = merged.float() - weight
    plain = weight.to(merged.dtype)
    changed = exact != 0
    flat, moved = exact.reshape(-1), effect.reshape(-1)
    base = weight.reshape(-1)
    return Sums(
        weight=float(base @ base),
        delta=float(flat @ flat),
        product=float(flat @ moved),
        effect=float(moved @ moved),
        changed=int(changed.sum()),
        swallowed=int((changed & (merged == plain)).sum()),
        clipped=int((merged.abs() >= _FLOAT16_MAX).sum()) if merged.dtype == torch.float16 else 0,
    )
