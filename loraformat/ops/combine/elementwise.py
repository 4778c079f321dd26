"""Element-wise combination of deltas, computed in row tiles.

The methods of `loraformat.algebra.interference` are taken of the effective deltas; the result has
full rank, and block Krylov iteration finds its best low-rank part without ever holding it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy

from loraformat.algebra.interference import drop, elect, magnitude_threshold, prune
from loraformat.algebra.lora import Pair
from loraformat.algebra.row_tiles import row_tiles
from loraformat.algebra.subspace import block_krylov, held
from loraformat.ops.combine.options import CombineOptions
from loraformat.ops.combine.weighted_deltas import WeightedDelta
from loraformat.ops.deltas.factors import experts_of
from loraformat.tensors.arrays import Array

__all__ = ["interfered"]

_TILE_ELEMENTS = 1 << 18


def interfered(terms: Sequence[WeightedDelta], options: CombineOptions) -> tuple[float, Pair]:
    """Combine one target by an element-wise method.

    Returns the share of the combined delta's squared norm that the factors hold, and float32 B and
    A; of rank 0 if nothing is left, and no bias needs a module.
    """
    rank = options.rank or max(term.delta.rank for term in terms)
    pairs, kept, total = [], 0.0, 0.0
    for matrix in _matrices(terms, options):
        found = block_krylov(held(matrix.tiles, matrix.shape), matrix.shape, rank)
        pairs.append(found.factors(rank))
        kept += float((found.values[:rank] ** 2).sum())
        total += found.squared_norm
    b, a = (numpy.stack(factors) for factors in zip(*pairs, strict=True))
    if len(terms[0].delta.a.shape) == 2:
        b, a = b[0], a[0]
    if not total:
        least = int(any(term.delta.bias is not None for term in terms))
        return 1.0, (b[..., :least], a[..., :least, :])
    return kept / total, (b, a)


def _matrices(terms: Sequence[WeightedDelta], options: CombineOptions) -> Iterator[_Matrix]:
    """Yield the matrix, or those of the experts in turn."""
    loaded = [(term, *term.factors()) for term in terms]
    for expert in range(experts_of(terms[0].delta)):
        parts = [
            _Part(term.weight, _one(b, expert), _one(a, expert), _seed(options.seed, term, expert))
            for term, b, a in loaded
        ]
        yield _Matrix(parts, options)


def _one(factor: Array, expert: int) -> Array:
    return (factor if factor.ndim == 2 else factor[expert]).astype(numpy.float32, copy=False)


def _seed(seed: int, term: WeightedDelta, expert: int) -> int:
    """Return a seed per module, so that modules do not affect each other."""
    words = repr((seed, term.adapter, f"{term.delta.target}/{expert}"))
    return int.from_bytes(hashlib.sha256(words.encode()).digest()[:7], "little")


@dataclass(frozen=True, slots=True)
class _Part:
    """One weighted delta."""

    weight: float
    b: Array
    a: Array
    seed: int

    def rows(self, first: int, last: int) -> Array:
        return self.b[first:last] @ self.a


class _Matrix:
    """The combined delta of one matrix, tile by tile, the same in every pass."""

    def __init__(self, parts: Sequence[_Part], options: CombineOptions) -> None:
        self._parts, self._options = parts, options
        self.shape = len(parts[0].b), parts[0].a.shape[1]
        rows, columns = self.shape
        keep = max(1, int(options.density * rows * columns))
        pruning = options.method in ("ties", "magnitude_prune")
        self._thresholds = [self._threshold(part, keep) for part in parts] if pruning else None

    def _threshold(self, part: _Part, keep: int) -> float:
        return magnitude_threshold(lambda: (part.rows(*x) for x in self._ranges()), keep)

    def _ranges(self) -> Iterator[tuple[int, int]]:
        return row_tiles(*self.shape, _TILE_ELEMENTS)

    def tiles(self) -> Iterator[tuple[int, Array]]:
        thin = self._pruned() if self._thresholds is not None else self._dropped()
        electing = self._options.method in ("ties", "dare_ties")
        for first, last in self._ranges():
            weighted = [
                part.weight * sparse(part.rows(first, last))
                for part, sparse in zip(self._parts, thin, strict=True)
            ]
            yield first, elect(weighted) if electing else numpy.sum(weighted, 0)

    def _pruned(self) -> list[Callable[[Array], Array]]:
        assert self._thresholds is not None
        return [partial(prune, threshold=threshold) for threshold in self._thresholds]

    def _dropped(self) -> list[Callable[[Array], Array]]:
        random = [numpy.random.default_rng(part.seed) for part in self._parts]
        density = self._options.density
        return [partial(drop, density=density, random=own) for own in random]
