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

import torch

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
    basis : torch.Tensor
        (..., m, k): X itself, or Q in float64.
    inverse : torch.Tensor
        float64 (..., k, k): R⁻¹, or the identity.
    r : torch.Tensor
        float64 (..., k, columns of X); k is the lesser dimension of X.
    """

    basis: torch.Tensor
    inverse: torch.Tensor
    r: torch.Tensor


def factorize(x: torch.Tensor) -> Thin:
    """Return the thin factors of a tall matrix.

    Parameters
    ----------
    x : torch.Tensor
        (..., m, r), any floating dtype, finite.

    Examples
    --------
    >>> factorize(torch.tensor([[3.0], [4.0]])).r.abs()
    tensor([[5.]], dtype=torch.float64)

    Parallel columns take the slower way:

    >>> found = factorize(torch.ones(4, 2))
    >>> (found.basis @ found.inverse @ found.r).round(decimals=12)[0]
    tensor([1., 1.], dtype=torch.float64)
    """
    if x.shape[-2] >= x.shape[-1]:
        found = _by_cholesky(x)
        if found is not None:
            return found
    q, r = torch.linalg.qr(x.double())
    return Thin(q, torch.eye(q.shape[-1], dtype=torch.float64).expand(*q.shape[:-2], -1, -1), r)


def _by_cholesky(x: torch.Tensor) -> Thin | None:
    products = gram(x)
    lengths = products.diagonal(dim1=-2, dim2=-1).sqrt()
    if not bool(((lengths > 0) & lengths.isfinite()).all()):
        return None
    unit = products / lengths[..., None, :] / lengths[..., :, None]
    upper, failed = torch.linalg.cholesky_ex(unit, upper=True)
    if bool(failed.any()):
        return None
    identity = torch.eye(upper.shape[-1], dtype=torch.float64)
    inverse = torch.linalg.solve_triangular(upper, identity.expand_as(upper), upper=True)
    if not bool((inverse.square().sum((-2, -1)) <= _LARGEST_INVERSE).all()):
        return None
    return Thin(x, inverse / lengths[..., :, None], upper * lengths[..., None, :])


def gram(x: torch.Tensor) -> torch.Tensor:
    """Return Xᵀ X in float64; X is converted in tiles.

    Parameters
    ----------
    x : torch.Tensor
        (..., m, k), any floating dtype.

    Returns
    -------
    torch.Tensor
        float64 (..., k, k).

    Examples
    --------
    >>> gram(torch.tensor([[3.0], [4.0]]))
    tensor([[25.]], dtype=torch.float64)
    """
    products = torch.zeros(*x.shape[:-2], x.shape[-1], x.shape[-1], dtype=torch.float64)
    for start, stop in _tiles(x):
        tile = x[..., start:stop, :].double()
        products += tile.mT @ tile
    return products


def tall_product(x: torch.Tensor, y: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return X Y of a tall X, computed in float64 and rounded once, to nearest even.

    Parameters
    ----------
    x : torch.Tensor
        (..., m, k), any floating dtype; converted in tiles.
    y : torch.Tensor
        float64 (..., k, n).
    dtype : torch.dtype
        Of the result.

    Examples
    --------
    >>> tall_product(torch.eye(2), torch.ones(2, 1, dtype=torch.float64), torch.float32)
    tensor([[1.],
            [1.]])
    """
    result, y = torch.empty(*x.shape[:-1], y.shape[-1], dtype=dtype), y.contiguous()
    for start, stop in _tiles(x):
        result[..., start:stop, :] = x[..., start:stop, :].double() @ y
    return result


def wide_product(x: torch.Tensor, y: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return X Y of a wide Y, as `tall_product` does for a tall X.

    Parameters
    ----------
    x : torch.Tensor
        float64 (..., m, k).
    y : torch.Tensor
        (..., k, n), any floating dtype; converted in tiles.
    dtype : torch.dtype
        Of the result.
    """
    result, x = torch.empty(*x.shape[:-1], y.shape[-1], dtype=dtype), x.contiguous()
    for start, stop in _tiles(y.mT):
        result[..., start:stop] = x @ y[..., start:stop].double()
    return result


def _tiles(x: torch.Tensor) -> Iterator[tuple[int, int]]:
    rows = x.shape[-2]
    return row_tiles(rows, x.numel() // max(rows, 1), _TILE_ELEMENTS, least=16)
