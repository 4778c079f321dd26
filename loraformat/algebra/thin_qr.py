"""Thin QR factorization of tall matrices: X = Q R.

Two ways to the same R, both in float64:

* *Gram and Cholesky*: XᵀX = RᵀR, and Q = X R⁻¹ need not be formed at all. Products of float32
  numbers are exact in float64, so the Gram matrix of float32 factors is as good as if X were
  float64, and X is read in tiles, never converted as a whole. But it squares the condition:
  what is below √ε of the rest is lost.
* *Householder QR*: slower, loses nothing.

The first is taken where it costs no digit that float32 could hold, and the second where it
would: columns that are zero, nearly parallel or nearly cancel. Columns are scaled to length 1
before that is judged, since columns of different lengths are no loss (van der Sluis 1969).

Every function takes leading dimensions (experts) and treats them one by one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy
from numpy.typing import DTypeLike, NDArray

from loraformat.algebra.row_tiles import row_tiles

__all__ = ["Thin", "factorize", "gram", "tall_product", "wide_product"]

#: Elements of a tile in float64: 512 KiB, which stays in a core's second cache.
_TILE_ELEMENTS = 1 << 15
#: Bound of ‖L⁻¹‖² for unit columns. Directions as weak as 1e-4 of a column keep eight digits.
_LARGEST_INVERSE = 1e8


@dataclass(frozen=True, slots=True)
class Thin:
    """X = Q R with Q = basis · inverse.

    Attributes
    ----------
    basis : array
        (..., m, k): X itself, or Q in float64.
    inverse : array
        float64 (..., k, k): R⁻¹, or the identity.
    r : array
        float64 (..., k, columns of X); k is the lesser dimension of X.
    """

    basis: NDArray[Any]
    inverse: NDArray[Any]
    r: NDArray[Any]


def factorize(x: NDArray[Any]) -> Thin:
    """Return the thin factors of a tall matrix (..., m, r) of any floating dtype, finite.

    Examples
    --------
    >>> abs(factorize(numpy.array([[3.0], [4.0]])).r)
    array([[5.]])

    Parallel columns take the slower way:

    >>> found = factorize(numpy.ones((4, 2)))
    >>> (found.basis @ found.inverse @ found.r).round(12)[0]
    array([1., 1.])
    """
    if x.shape[-2] >= x.shape[-1]:
        found = _by_cholesky(x)
        if found is not None:
            return found
    q, r = numpy.linalg.qr(x.astype(numpy.float64, copy=False))
    return Thin(q, numpy.eye(q.shape[-1]), r)


def _by_cholesky(x: NDArray[Any]) -> Thin | None:
    with numpy.errstate(over="ignore", invalid="ignore"):
        products = gram(x)
    lengths = numpy.sqrt(numpy.diagonal(products, axis1=-2, axis2=-1))
    if not ((lengths > 0) & numpy.isfinite(lengths)).all():
        return None
    try:
        upper = numpy.linalg.cholesky(
            products / lengths[..., None] / lengths[..., None, :], upper=True
        )
    except numpy.linalg.LinAlgError:
        return None
    inverse = numpy.linalg.inv(upper)
    if not ((inverse**2).sum((-2, -1)) <= _LARGEST_INVERSE).all():
        return None
    return Thin(x, inverse / lengths[..., None], upper * lengths[..., None, :])


def gram(x: NDArray[Any]) -> NDArray[Any]:
    """Return Xᵀ X, (..., k, k), in float64; X (..., m, k) is converted in tiles.

    Examples
    --------
    >>> gram(numpy.array([[3.0], [4.0]]))
    array([[25.]])
    """
    products = numpy.zeros((*x.shape[:-2], x.shape[-1], x.shape[-1]))
    for rows in _tiles(x):
        tile = x[..., rows, :].astype(numpy.float64)
        products += tile.mT @ tile
    return products


def tall_product(x: NDArray[Any], y: NDArray[Any], dtype: DTypeLike) -> NDArray[Any]:
    """Return X Y of a tall X, computed in float64 and rounded once, to nearest even.

    X is (..., m, k), of any floating dtype, and converted in tiles; Y is float64 (..., k, n).

    Examples
    --------
    >>> tall_product(numpy.eye(2), numpy.ones((2, 1)), numpy.float32)
    array([[1.],
           [1.]], dtype=float32)
    """
    result = numpy.empty((*x.shape[:-1], y.shape[-1]), dtype)
    for rows in _tiles(x):
        result[..., rows, :] = x[..., rows, :].astype(numpy.float64) @ y
    return result


def wide_product(x: NDArray[Any], y: NDArray[Any], dtype: DTypeLike) -> NDArray[Any]:
    """Return X Y of a float64 X and a wide Y, as `tall_product` does for a tall X."""
    result = numpy.empty((*x.shape[:-1], y.shape[-1]), dtype)
    for columns in _tiles(y.mT):
        result[..., columns] = x @ y[..., columns].astype(numpy.float64)
    return result


def _tiles(x: NDArray[Any]) -> Iterator[slice]:
    rows = x.shape[-2]
    for first, last in row_tiles(rows, x.size // max(rows, 1), _TILE_ELEMENTS, least=16):
        yield slice(first, last)
