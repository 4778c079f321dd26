"""The low-rank terms of each stored matrix, as one product and one gain, and tiles to work on.

Several adapters, experts of a stack, parts of a fused parameter and DoRA's norms meet here;
what comes out is D and g of the formula in `loraformat.undo.fixed_point`, for one matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy

from loraformat.algebra.blas import one_blas_thread
from loraformat.algebra.row_tiles import row_tiles
from loraformat.errors import UnsupportedError, printable
from loraformat.model.adapter import Adapter, LoraDelta
from loraformat.model.checkpoint import DenseTensor
from loraformat.nf4.kernels import threads
from loraformat.nf4.kernels.merge_tile import merge_tile
from loraformat.ops.merge.plan import DeltaTerm
from loraformat.tensors.arrays import Array, check_finite
from loraformat.undo.fixed_point import Product, product

__all__ = [
    "TILE_ELEMENTS", "LowRankTerm", "LowRankUpdate", "block_matrices", "finite", "over_tiles",
]  # fmt: skip

#: A gain that leaves nothing of a weight, and by which a delta can be divided.
_UNSEEN = 2.0**-96
#: Elements of a tile: it and what is computed from it stay in the cache.
TILE_ELEMENTS = 1 << 16
Found = TypeVar("Found")


def over_tiles(
    work: Callable[[int, int], Found], rows: int, columns: int, elements: int = TILE_ELEMENTS
) -> list[Found]:
    """Work on tiles of whole rows, on all CPUs, each matrix product on one.

    Parameters
    ----------
    work : callable
        Gets the first row of a tile, and the one behind its last.
    rows, columns : int
    elements : int
        Of a tile.

    Returns
    -------
    list
        What ``work`` returned, in the order of the tiles.

    Examples
    --------
    >>> over_tiles(lambda start, stop: stop - start, 5, 10, 20)
    [2, 2, 1]
    """
    tiles = list(row_tiles(rows, columns, elements))
    found: dict[int, Found] = {}

    def task(start: int, stop: int) -> None:
        with numpy.errstate(all="ignore"):  # whoever asks looks at what is not finite
            found.update((number, work(*tiles[number])) for number in range(start, stop))

    with one_blas_thread():
        threads.run(task, len(tiles), 1)
    return [found[number] for number in range(len(tiles))]


class LowRankTerm(NamedTuple):
    """What one adapter adds to a matrix.

    Attributes
    ----------
    b, a : array
        float64 (out, r) and (r, in).
    scaling : float
    magnitude : array or None
        float64 (out,): DoRA's.
    weight : float
        The user's.
    """

    b: Array
    a: Array
    scaling: float
    magnitude: Array | None
    weight: float


@dataclass(frozen=True)
class LowRankUpdate:
    """One matrix of a stored tensor, and the low-rank terms that are added to it.

    Attributes
    ----------
    shape : tuple of int
        As stored: rows, columns.
    transposed : bool
        Output features run along the columns.
    terms : tuple of LowRankTerm
    """

    shape: tuple[int, int]
    transposed: bool
    terms: tuple[LowRankTerm, ...]

    def measured_gains(self, weight: Array) -> list[Array]:
        """Return each DoRA term's m / ‖W + D‖ by output feature, in float32.

        The weight is the original: float32, float16 or bfloat16, contiguous.
        """
        return [
            self._gain(term, term.magnitude, weight)
            for term in self.terms
            if term.magnitude is not None
        ]

    def _gain(self, term: LowRankTerm, magnitude: Array, weight: Array) -> Array:
        delta = product(*self._oriented(term.b * term.scaling, term.a), exact=False)

        def work(start: int, stop: int) -> Array:
            values = delta.rows(start, stop)
            merge_tile(weight[start:stop], values, None, values)
            numpy.square(values, out=values)
            squares: Array = values.sum(0 if self.transposed else 1, dtype=numpy.float64)
            return squares

        sums = over_tiles(work, *self.shape)
        norms = numpy.sqrt(sum(sums) if self.transposed else numpy.concatenate(sums))
        gains = numpy.zeros_like(norms)
        numpy.divide(magnitude, norms, out=gains, where=norms > 0)
        return gains.astype(numpy.float32)

    def _oriented(self, b: Array, a: Array) -> tuple[Array, Array]:
        return (a.T, b.T) if self.transposed else (b, a)

    def combined(
        self, gains: Sequence[Array], *, exact: bool, in_turn: bool = False
    ) -> tuple[Product, Array | None]:
        """Return the sum of all terms as one product, and the gain of each row.

        Parameters
        ----------
        gains : sequence of array
            As `measured_gains` returns them.
        exact : bool
            See `loraformat.undo.fixed_point.product`.
        in_turn : bool
            Each term changes what those before it made; else all change the original.

        Notes
        -----
        With DoRA's gain gᵢ, 1 without, and the user's weight ωᵢ the merged weight is

            W + Σ ωᵢ (gᵢ (W + Dᵢ) − W) = G · (W + Σ (ωᵢ gᵢ / G) Dᵢ),   G = 1 + Σ ωᵢ (gᵢ − 1)

        so that it stays one low-rank delta and one gain. In turn it is, as in PEFT 0.21, which
        measures every norm on the original,

            Wᵢ = hᵢ Wᵢ₋₁ + ωᵢ gᵢ Dᵢ,   hᵢ = 1 + ωᵢ (gᵢ − 1),   G = Π hᵢ

        with the same form: ωᵢ gᵢ Π hⱼ / G over the j behind i in place of ωᵢ gᵢ / G.
        """
        left = iter(gains)
        by_term = [
            numpy.ones(len(term.b)) if term.magnitude is None else next(left).astype(numpy.float64)
            for term in self.terms
        ]
        total, shares = (_in_turn if in_turn else _at_once)(self.terms, by_term)
        rounded = total.astype(numpy.float32)
        divisor = numpy.where(rounded == 0, numpy.inf, rounded.astype(numpy.float64))
        scaled = [
            term.b * (term.weight * term.scaling * share / divisor)[:, None]
            for term, share in zip(self.terms, shares, strict=True)
        ]
        b, a = numpy.concatenate(scaled, 1), numpy.concatenate([term.a for term in self.terms])
        along = rounded[None, :] if self.transposed else rounded[:, None]
        return product(*self._oriented(b, a), exact=exact), along if gains else None


def _at_once(terms: Sequence[LowRankTerm], gains: Sequence[Array]) -> tuple[Array, Sequence[Array]]:
    """Return G and gᵢ of each term, where all change the original."""
    scaled = [(t.weight, gain) for t, gain in zip(terms, gains, strict=True)
              if t.magnitude is not None]  # fmt: skip
    if len(scaled) == 1 and scaled[0][0] == 1:
        return scaled[0][1], gains
    return sum((user * (gain - 1) for user, gain in scaled), numpy.ones_like(gains[0])), gains


def _in_turn(terms: Sequence[LowRankTerm], gains: Sequence[Array]) -> tuple[Array, Sequence[Array]]:
    """Return G and, by term, gᵢ Π hⱼ over the terms behind it."""
    shares, behind = [], numpy.ones_like(gains[0])
    for term, gain in zip(reversed(terms), reversed(gains), strict=True):
        shares.append(gain * behind)
        behind = behind * (gain if term.weight == 1 else 1 + term.weight * (gain - 1))
    # A row that one term makes zero begins anew with the next: nothing is seen of the original.
    return numpy.where(behind == 0, _UNSEEN, behind), shares[::-1]


def block_matrices(
    shape: tuple[int, ...], terms: Sequence[DeltaTerm], adapters: Sequence[Adapter]
) -> Iterator[LowRankUpdate | None]:
    """Return what is added to each matrix of a stored tensor, a stack of them; None for nothing.

    A vector is a matrix of one row.
    """
    stack = shape[0] if len(shape) == 3 else 1
    columns = shape[-1] if shape else 1
    rows = shape[-2] if len(shape) > 1 else 1
    by_block: dict[int, list[DeltaTerm]] = {}
    for term in terms:
        by_block.setdefault(term.block, []).append(term)
    for block in range(stack):
        own = by_block.get(block, [])
        yield _matrix((rows, columns), own, adapters) if own else None


def _matrix(
    shape: tuple[int, int], terms: list[DeltaTerm], adapters: Sequence[Adapter]
) -> LowRankUpdate:
    deltas = [adapters[term.adapter].deltas[term.target] for term in terms]
    transposed = {delta.orientation == "transposed" and t.part == "delta"
                  for delta, t in zip(deltas, terms, strict=True)}  # fmt: skip
    if len(transposed) > 1:
        raise UnsupportedError(
            f"two adapters see {printable(terms[0].target)} in different orientations"
        )
    try:
        factors = tuple(
            _factors(delta, term, shape[0]) for delta, term in zip(deltas, terms, strict=True)
        )
    except UnsupportedError as error:
        error.path = error.path or str(adapters[terms[0].adapter].path)
        raise
    return LowRankUpdate(shape, transposed.pop(), factors)


def _factors(delta: LoraDelta, term: DeltaTerm, rows: int) -> LowRankTerm:
    if term.part == "bias":
        assert delta.bias is not None
        a = finite(delta.bias, delta.bias.array())[None, :]
        return LowRankTerm(numpy.ones((1, 1)), a, delta.scaling, None, term.weight)
    a, b = delta.a.array(), delta.b.array()
    if term.expert is not None:
        a, b = a[term.expert], b[term.expert]
    magnitude, part = None, slice(*term.rows) if term.rows else slice(None)
    if delta.magnitude is not None:
        magnitude = finite(delta.magnitude, delta.magnitude.array().reshape(-1)[part])
    b = finite(delta.b, b[part])
    if term.into is not None:
        whole = numpy.zeros((rows, b.shape[1]))
        whole[slice(*term.into)] = b
        b = whole
    return LowRankTerm(b, finite(delta.a, a), delta.scaling, magnitude, term.weight)


def finite(tensor: DenseTensor, values: Array) -> Array:
    """Return values in float64; NaN or infinity is an UnsupportedError."""
    values = values.astype(numpy.float64)
    check_finite(values, tensor.name, error=UnsupportedError)
    return values
