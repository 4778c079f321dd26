"""Reproducible fixed-point low-rank products, and the merge formula.

A floating-point matrix product depends on the order of its sums, and so on the library,
the number of threads and the shape of a tile. Undoing a merge needs the very same delta
again, so it is computed in fixed point: each row of the left factor and each column of the
right one is scaled by a power of two and rounded to integers of

    bits = ⌊(53 − ⌈log₂ r⌉) / 2⌋

bits. Every partial sum of the r products is then an integer of at most 2^53, which float64
holds exactly: any order of summation, with or without fused operations, gives one result.
For r = 16 there are 24 bits, the precision of float32. Scaling by powers of two does not
round, so the factors are left scaled and the product is an ordinary float64 product. First
the k-th column and the k-th row are balanced: with e the least exponents that bound them,
the column is multiplied by 2^-t and the row by 2^t, t = ⌊(e_column − e_row) / 2⌋.

A weight w with the delta d and the gain g of its row is merged as

    f(w) = round(g · (w + d))

in float32, every step rounded to nearest even, then rounded once more to the dtype of the
output (`loraformat.nf4.kernels.merge_tile`). All steps are monotone in w, which is what
`loraformat.undo.interval_code` builds on. Nothing here knows files.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy

from loraformat.errors import UnsupportedError
from loraformat.tensors.arrays import Array

__all__ = ["Product", "fixed_point_bits", "product", "to_fixed_point"]

_MANTISSA_BITS = 53
#: Largest exponent of a factor, so that a product of two neither over- nor underflows.
_MAX_EXPONENT = 400


def fixed_point_bits(rank: int) -> int:
    """Return how many bits the integers may have for a sum of ``rank`` products.

    Examples
    --------
    >>> fixed_point_bits(16), fixed_point_bits(512), fixed_point_bits(1)
    (24, 22, 26)
    """
    return (_MANTISSA_BITS - max(rank - 1, 0).bit_length()) // 2


def to_fixed_point(factor: Array, axis: int, bits: int) -> Array:
    """Round a float64 matrix to integers times one power of two per row or column.

    Rows share a power for axis 1, columns for axis 0; each integer is at most 2^bits. Raises
    `UnsupportedError` if a value is not finite, or beyond 2^400.

    Examples
    --------
    >>> to_fixed_point(numpy.array([[1.0, 0.3]]), 1, 2)
    array([[1. , 0.5]])
    """
    step = _exponents(factor, axis) - bits
    rounded: Array = numpy.rint(factor * numpy.ldexp(1.0, -step)) * numpy.ldexp(1.0, step)
    return rounded


@dataclass(frozen=True, slots=True)
class Product:
    """A low-rank matrix that is evaluated by rows.

    Attributes
    ----------
    left : array
        (rows, r), float64 in fixed point, or float32.
    right : array
        (r, columns).
    """

    left: Array
    right: Array

    def rows(self, start: int, stop: int) -> Array:
        """Return rows ``start`` to ``stop`` in float32, rounded to nearest even."""
        made: Array = self.left[start:stop] @ self.right
        return made.astype(numpy.float32, copy=False)


def product(left: Array, right: Array, *, exact: bool) -> Product:
    """Prepare the product of float64 factors (rows, r) and (r, columns).

    An exact one has the same bits on every machine, at the cost of a float64 product; the other is
    in float32.

    Examples
    --------
    >>> ones = numpy.ones((2, 3))
    >>> product(ones, ones.T, exact=True).rows(0, 1)
    array([[3., 3.]], dtype=float32)
    """
    if not exact:
        return Product(left.astype(numpy.float32), right.astype(numpy.float32))
    bits = fixed_point_bits(left.shape[1])
    left, right = _balanced(left, right)
    return Product(to_fixed_point(left, 1, bits), to_fixed_point(right, 0, bits))


def _balanced(left: Array, right: Array) -> tuple[Array, Array]:
    """Balance the k-th column and row by powers of two, which changes no product.

    Without it, a rank with a large column and a tiny row would leave no bits to its neighbours.
    """
    shift = (_exponents(left, 0) - _exponents(right, 1).T) // 2
    return left * numpy.ldexp(1.0, -shift), right * numpy.ldexp(1.0, shift.T)


def _exponents(factor: Array, axis: int) -> Array:
    """Return the least e with all values below 2^e, clamped, per row or column."""
    largest = numpy.abs(factor).max(axis, keepdims=True, initial=0.0)
    if not numpy.isfinite(largest).all():
        raise UnsupportedError("an adapter's factor holds NaN or infinity")
    exponent: Array = numpy.frexp(largest)[1]
    if (exponent > _MAX_EXPONENT).any():
        raise UnsupportedError(f"an adapter's factor is beyond 2^{_MAX_EXPONENT}")
    return numpy.maximum(exponent, -_MAX_EXPONENT)
