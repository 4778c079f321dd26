"""The low-rank terms of each stored matrix, as one product and one gain.

Several adapters, experts of a stack, parts of a fused parameter and DoRA's norms meet here;
what comes out is D and g of the formula in `loraformat.undo.fixed_point`, for one matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy

from loraformat.errors import UnsupportedError, printable
from loraformat.model.adapter import Adapter, LoraDelta
from loraformat.model.checkpoint import DenseTensor
from loraformat.model.tensor_values import check_finite
from loraformat.nf4.kernels.merge_tile import merge_tile
from loraformat.ops.merge.plan import DeltaTerm
from loraformat.ops.merge.tile_threads import over_tiles
from loraformat.tensors.arrays import Array
from loraformat.undo.fixed_point import Product, product

__all__ = ["LowRankUpdate", "block_matrices", "finite"]

#: A gain that leaves nothing of a weight, and by which a delta can be divided.
_UNSEEN = 2.0**-96


@dataclass(frozen=True)
class LowRankUpdate:
    """One matrix of a stored tensor, and the low-rank terms that are added to it.

    Attributes
    ----------
    shape : tuple of int
        As stored: rows, columns.
    transposed : bool
        Output features run along the columns.
    factors : tuple of (b, a, scale, magnitude)
        float64 B (out, r) and A (r, in), the scaling, DoRA's magnitudes or None.
    weights : tuple of float
        The user's, one per factor.
    """

    shape: tuple[int, int]
    transposed: bool
    factors: tuple[tuple[Array, Array, float, Array | None], ...]
    weights: tuple[float, ...]

    @cached_property
    def has_gain(self) -> bool:
        """Whether any term is DoRA's."""
        return any(magnitude is not None for *_, magnitude in self.factors)

    def measured_gains(self, weight: Callable[[int, int], Array]) -> list[Array]:
        """Return each DoRA term's m / ‖W + D‖ by output feature, in float32.

        Parameters
        ----------
        weight : callable
            Returns rows of the original.
        """
        return [
            self._gain(b, a, scaling, magnitude, weight)
            for b, a, scaling, magnitude in self.factors
            if magnitude is not None
        ]

    def _gain(
        self,
        b: Array,
        a: Array,
        scaling: float,
        magnitude: Array,
        weight: Callable[[int, int], Array],
    ) -> Array:
        delta = product(*self._oriented(b * scaling, a), exact=False)

        def work(start: int, stop: int) -> Array:
            values = delta.rows(start, stop)
            merge_tile(weight(start, stop), values, None, values)
            numpy.square(values, out=values)
            squares: Array = values.sum(0 if self.transposed else 1, dtype=numpy.float64)
            return squares

        sums = over_tiles(work, *self.shape)
        norms = numpy.sqrt(sum(sums) if self.transposed else numpy.concatenate(sums))
        gains = numpy.divide(magnitude, norms, out=numpy.zeros_like(norms), where=norms > 0)
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
        rows = self.factors[0][0].shape[0]
        by_term, left = [], iter(gains)
        for *_, magnitude in self.factors:
            one = numpy.ones(rows)
            by_term.append(one if magnitude is None else next(left).astype(numpy.float64))
        if in_turn:
            total, shares = _in_turn(by_term, self.weights)
        else:
            total, shares = self._at_once(by_term, len(gains)), by_term
        rounded = total.astype(numpy.float32)
        divisor = numpy.where(rounded == 0, numpy.inf, rounded.astype(numpy.float64))
        scaled = [
            b * (user * scaling * share / divisor)[:, None]
            for (b, _, scaling, _), user, share in zip(
                self.factors, self.weights, shares, strict=True
            )
        ]
        b = numpy.concatenate(scaled, 1)
        a = numpy.concatenate([a for _, a, _, _ in self.factors])
        along = rounded[None, :] if self.transposed else rounded[:, None]
        return product(*self._oriented(b, a), exact=exact), along if self.has_gain else None

    def _at_once(self, by_term: Sequence[Array], count: int) -> Array:
        """Return G where all terms change the original; ``count`` of them have gains."""
        total = numpy.ones_like(by_term[0])
        for (*_, magnitude), user, gain in zip(self.factors, self.weights, by_term, strict=True):
            if magnitude is not None:
                total = gain if user == 1 and count == 1 else total + user * (gain - 1)
        return total


def _in_turn(by_term: Sequence[Array], weights: Sequence[float]) -> tuple[Array, list[Array]]:
    """Return G and, by term, gᵢ Π hⱼ over the terms behind it."""
    shares, behind = [], numpy.ones_like(by_term[0])
    for gain, user in zip(reversed(by_term), reversed(weights), strict=True):
        shares.append(gain * behind)
        behind = behind * (gain if user == 1 else 1 + user * (gain - 1))
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
    return LowRankUpdate(shape, transposed.pop(), factors, tuple(term.weight for term in terms))


def _factors(
    delta: LoraDelta, term: DeltaTerm, rows: int
) -> tuple[Array, Array, float, Array | None]:
    scaling = delta.scaling
    if term.part == "bias":
        assert delta.bias is not None
        a = finite(delta.bias, delta.bias.array())[None, :]
        return numpy.ones((1, 1)), a, scaling, None
    a, b = delta.a.array(), delta.b.array()
    magnitude = None if delta.magnitude is None else delta.magnitude.array().reshape(-1)
    if term.expert is not None:
        a, b = a[term.expert], b[term.expert]
    if term.rows is not None:
        b = b[slice(*term.rows)]
        magnitude = None if magnitude is None else magnitude[slice(*term.rows)]
    if term.into is not None:
        whole = numpy.zeros((rows, b.shape[1]), b.dtype)
        whole[slice(*term.into)] = b
        b = whole
    if magnitude is not None:
        assert delta.magnitude is not None
        magnitude = finite(delta.magnitude, magnitude)
    return finite(delta.b, b), finite(delta.a, a), scaling, magnitude


def finite(tensor: DenseTensor, values: Array) -> Array:
    """Return values in float64, if none is NaN or infinite.

    Raises
    ------
    UnsupportedError
    """
    values = values.astype(numpy.float64)
    check_finite(values, tensor.name, error=UnsupportedError)
    return values
