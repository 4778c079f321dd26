"""Low-rank approximation of one difference, and the options that decide its rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy

from loraformat.algebra.lora import Pair
from loraformat.algebra.subspace import Approximation, block_krylov, held
from loraformat.errors import UsageError
from loraformat.ops.extract.difference import Difference

__all__ = ["ExtractOptions", "Fit", "fit"]

_FIRST_BLOCK = 32


@dataclass(frozen=True, slots=True)
class ExtractOptions:
    """Options of ``extract``, checked together; `seed` is that of the random start.

    Raises
    ------
    UsageError
        If both rank and energy are given, or one is out of its range.
    """

    rank: int | Literal["auto"] | None = None
    energy: float | None = None
    max_rank: int = 256
    skip: Sequence[str] = ()
    dtype: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rank is not None and self.energy is not None:
            raise UsageError("give either --rank or --energy, not both")
        if self.rank is None and self.energy is None:
            object.__setattr__(self, "rank", "auto")
        if self.rank != "auto" and self.rank is not None and self.rank < 1:
            raise UsageError("rank is at least 1, or auto")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise UsageError(f"energy is a fraction above 0 and at most 1, not {self.energy}")
        if self.max_rank < 1:
            raise UsageError("max-rank is at least 1")


@dataclass(frozen=True, slots=True)
class Fit:
    """Low-rank approximation of one difference.

    Attributes
    ----------
    pair : Pair
        Balanced float32 factors B and A, the strongest parts first.
    rank : int
    kept, squared_norm : float
        ‖B A‖² and ‖D‖².
    edge : float
        Singular value where the rounding noise of the difference begins.
    capped : bool
        More parts were wanted than the largest rank allows.
    """

    pair: Pair
    rank: int
    kept: float
    squared_norm: float
    edge: float
    capped: bool

    def padded(self, rank: int) -> Pair:
        """Return B and A, padded with zeros to the rank of another expert."""
        (b, a), more = self.pair, rank - self.rank
        return numpy.pad(b, ((0, 0), (0, more))), numpy.pad(a, ((0, more), (0, 0)))


def fit(difference: Difference, options: ExtractOptions) -> Fit:
    """Approximate a difference.

    The rank is 0 if nothing stands out of the rounding noise, whatever rank is asked for. It is
    not known beforehand if an energy or the noise edge decides it: blocks are doubled until
    they hold more than is wanted.
    """
    edge = difference.noise_edge()
    most = min(difference.shape)
    fixed = options.rank if isinstance(options.rank, int) else None
    limit = min(fixed or options.max_rank, most)
    tiles = held(difference.tiles, difference.shape)
    found, wanted = None, limit
    for block in _blocks(limit, fixed is not None):
        del found  # before the next one, which is twice as large
        found = block_krylov(tiles, difference.shape, block, seed=options.seed)
        wanted = limit if fixed else _wanted(found, edge, options)
        if not (found.values > edge).any():
            wanted = 0
        if wanted < block:
            break
    assert found is not None
    rank = min(wanted, limit)
    return Fit(
        pair=found.factors(rank),
        rank=rank,
        kept=float((found.values[:rank] ** 2).sum()),
        squared_norm=found.squared_norm,
        edge=edge,
        capped=fixed is None and wanted > limit and limit < most,
    )


def _blocks(limit: int, fixed: bool) -> Iterator[int]:
    block = limit if fixed else min(_FIRST_BLOCK, limit)
    while block < limit:
        yield block
        block *= 2
    yield limit


def _wanted(found: Approximation, edge: float, options: ExtractOptions) -> int:
    values = found.values
    if options.energy is None:
        return int((values > edge).sum())
    # float32's rounding of the certificate must not send an exact fit looking for more.
    goal = options.energy * found.squared_norm * (1 - 1e-6)
    return int((numpy.cumsum(values**2) < goal).sum()) + 1 if goal else 0
