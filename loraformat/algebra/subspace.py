"""Low-rank approximation of a matrix that is read in row tiles.

Block Krylov iteration (Musco & Musco 2015): from a random block Ω of b columns build an
orthonormal basis P of span{Ω, DᵀD Ω, ..., (DᵀD)^q Ω}, block by block, each made orthogonal
to all before it; then the best approximation with rows in that span is

    D ≈ W Pᵀ,  W = D P,   and of rank k:  the k leading singular triples of W.

One pass over the tiles gives D Z of one block and DᵀD Z, the next block's start, at once.
Neither gaps in the spectrum nor oversampling are needed: the error exceeds the optimum by a
factor of at most 1 + ε after q = O(log n / √ε) steps.

The certificate costs nothing: P is orthonormal, so ‖D − M_k‖² = ‖D‖² − Σ σᵢ² exactly (up to
float32 rounding), whatever the spectrum was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy
from numpy.typing import NDArray

from loraformat.algebra.row_tiles import row_tiles

__all__ = ["Approximation", "Tiles", "block_krylov", "held", "working_bytes"]

#: Called once per pass: yields (first row, tile), tiles in float32, in order.
Tiles = Callable[[], Iterator[tuple[int, NDArray[Any]]]]

#: Directions weaker than this share of a block's squared norm are nothing but rounding, and too
#: small to be scaled up. Weaker ones than float32 resolves stay: they are random, as Ω was.
_ROUNDING = 1e-18
#: Narrower blocks converge slowly and are hardly cheaper: a tile is read for either.
_NARROWEST = 16
_HELD_BYTES = 256 << 20
#: Rows of W that are taken to float64 at once.
_WIDE_ROWS = 2048


@dataclass(frozen=True, slots=True)
class Approximation:
    """Leading singular triplets of a matrix, with the captured norm.

    Attributes
    ----------
    images : list of array
        float32 blocks of columns, (m, b) each, of W = D P.
    basis : array
        P: float32 (n, c), orthonormal columns.
    rotation : array
        float32 (c, c'): right singular vectors of W.
    values : array
        float64 (c',), descending: approximate singular values, each at most the true one.
    squared_norm : float
        ‖D‖², of the whole matrix.
    """

    images: list[NDArray[Any]]
    basis: NDArray[Any]
    rotation: NDArray[Any]
    values: NDArray[Any]
    squared_norm: float

    def captured(self, rank: int) -> float:
        """Return the share of ‖D‖² that the first `rank` parts hold; 1 for D = 0."""
        kept = float((self.values[:rank] ** 2).sum())
        return min(kept / self.squared_norm, 1.0) if self.squared_norm else 1.0

    def factors(self, rank: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return balanced float32 factors (m, rank) and (rank, n) of the best part."""
        root = numpy.sqrt(self.values[:rank]).astype(numpy.float32)
        rotation = self.rotation[:, :rank]
        left = rotation * numpy.divide(1, root, out=numpy.zeros_like(root), where=root > 0)
        b, first = numpy.zeros((len(self.images[0]), len(root)), numpy.float32), 0
        for image in self.images:
            last = first + image.shape[1]
            b += image @ left[first:last]
            first = last
        return b, (rotation * root).T @ self.basis.T


def block_krylov(
    tiles: Tiles, shape: tuple[int, int], block: int, *, passes: int = 4, seed: int = 0
) -> Approximation:
    """Approximate a matrix in ``passes + 1`` passes over it.

    Parameters
    ----------
    tiles : callable
        See `Tiles`.
    shape : tuple of int
        (m, n).
    block : int
        Columns per step, 16 at least; the rank wanted.
    passes : int
        Krylov steps: the basis grows to ``passes + 1`` blocks.
    seed : int
        Of the random start.

    Returns
    -------
    Approximation

    Examples
    --------
    >>> d = numpy.outer(numpy.arange(4), numpy.ones(3)).astype(numpy.float32)
    >>> found = block_krylov(lambda: iter([(0, d)]), (4, 3), 1)
    >>> round(found.captured(1), 6), [round(v, 4) for v in found.values[:1].tolist()]
    (1.0, [6.4807])
    """
    m, n = shape
    width = min(max(block, _NARROWEST), m, n)
    if width in (m, n):
        return _of_full_rank(tiles, shape)
    start = numpy.random.default_rng(seed).standard_normal((n, width), numpy.float32)
    z = numpy.linalg.qr(start).Q
    basis = numpy.empty((n, min((passes + 1) * width, n)), numpy.float32)
    images: list[NDArray[Any]] = []
    filled, squared_norm = 0, 0.0
    for step in range(passes + 1):
        last = step == passes or filled + z.shape[1] >= n
        y, following, squared_norm = _look(tiles, m, z, last)
        images.append(y)
        basis[:, filled : filled + z.shape[1]] = z
        filled += z.shape[1]
        if last:
            break
        z = _orthonormal(following, basis[:, :filled])
        if not z.shape[1]:
            break  # the span holds all of D
    return _principal(images, basis[:, :filled], squared_norm)


def working_bytes(shape: tuple[int, int], block: int, *, passes: int = 4) -> int:
    """Return the peak memory of `block_krylov` over `held` tiles, besides one tile (bytes).

    Parameters
    ----------
    shape : tuple of int
        (m, n).
    block, passes : int
        As there.

    Notes
    -----
    With b columns per block and c in the basis: the matrix, if it is held; basis and images,
    4 c (m + n); a block in float32 and float64 while it is made orthogonal, 36 b n; the Gram
    matrix with what its eigenvectors take, 48 c², and the rows that it is summed from; the
    factors, and what they are scaled to, 12 b (m + n).

    Examples
    --------
    >>> working_bytes((4096, 4096), 16)
    76591104
    """
    m, n = shape
    b = min(max(block, _NARROWEST), m, n)
    c = min((passes + 1) * b, n)
    matrix = 4 * m * n if 4 * m * n <= _HELD_BYTES else 0
    wide = 2 * 8 * c * min(m, _WIDE_ROWS)
    return matrix + 4 * c * (m + n) + 36 * b * n + 48 * c * c + wide + 12 * b * (m + n)


def _of_full_rank(tiles: Tiles, shape: tuple[int, int]) -> Approximation:
    """Decompose a matrix whose rank does not exceed the wanted one, from a basis of its rows.

    Iteration would lose parts that are weaker than float32 resolves beside the strongest.
    """
    m, n = shape
    if n <= m:
        basis = numpy.eye(n, dtype=numpy.float32)
    else:
        rows = numpy.empty(shape, numpy.float32)
        for first, tile in tiles():
            rows[first : first + len(tile)] = tile
        basis = numpy.linalg.qr(rows.T).Q
    images, _, squared_norm = _look(tiles, m, basis, last=True)
    return _principal([images], basis, squared_norm)


def _look(
    tiles: Tiles, rows: int, z: NDArray[Any], last: bool
) -> tuple[NDArray[Any], NDArray[Any], float]:
    """Return D Z, DᵀD Z and ‖D‖² from one pass."""
    y = numpy.empty((rows, z.shape[1]), numpy.float32)
    following, squared_norm = numpy.zeros_like(z), 0.0
    for first, tile in tiles():
        piece = numpy.matmul(tile, z, out=y[first : first + len(tile)])
        if not last:
            following += tile.T @ piece
        # Rows one by one in float32, their sum in float64: no digit of the certificate is lost.
        squared_norm += float(numpy.vecdot(tile, tile).sum(dtype=numpy.float64))
    if not math.isfinite(squared_norm):
        raise numpy.linalg.LinAlgError("the matrix is not finite")
    return y, following, squared_norm


def _orthonormal(z: NDArray[Any], basis: NDArray[Any]) -> NDArray[Any]:
    """Return an orthonormal basis of a block's part outside another basis."""
    scale = float(numpy.sum(numpy.square(z, dtype=numpy.float64)))
    for _ in range(2):
        z = z - basis @ (basis.T @ z)
    wide = z.astype(numpy.float64)
    eigenvalues, vectors = numpy.linalg.eigh(wide.T @ wide)
    kept = eigenvalues > _ROUNDING * scale
    kept[: max(0, z.shape[1] + basis.shape[1] - len(basis))] = False  # never more than n in all
    z = (wide @ (vectors[:, kept] / numpy.sqrt(eigenvalues[kept]))).astype(numpy.float32)
    return numpy.linalg.qr(z - basis @ (basis.T @ z)).Q


def _principal(
    images: list[NDArray[Any]], basis: NDArray[Any], squared_norm: float
) -> Approximation:
    """Rotate W Pᵀ to singular order, through the small Gram matrix WᵀW in float64."""
    rows, columns = len(images[0]), basis.shape[1]
    gram = numpy.zeros((columns, columns))
    for first, last in row_tiles(rows, 1, _WIDE_ROWS):
        wide = numpy.concatenate([x[first:last] for x in images], 1, dtype=numpy.float64)
        gram += wide.T @ wide
    eigenvalues, vectors = numpy.linalg.eigh(gram)
    values = numpy.sqrt(numpy.maximum(eigenvalues[::-1][:rows], 0))
    rotation = vectors[:, ::-1][:, :rows].astype(numpy.float32)
    return Approximation(images, basis, rotation, values, squared_norm)


def held(tiles: Tiles, shape: tuple[int, int]) -> Tiles:
    """Return the same tiles of a matrix, cached after the first pass.

    One above 256 MiB is not remembered: its tiles are computed anew in every pass.
    """
    if 4 * shape[0] * shape[1] > _HELD_BYTES:
        return tiles
    matrix = numpy.empty(shape, numpy.float32)  # one block, which is freed as a whole
    starts: list[tuple[int, int]] = []
    complete = False

    def once() -> Iterator[tuple[int, NDArray[Any]]]:
        nonlocal complete
        if not complete:
            starts.clear()
            for first, tile in tiles():
                last = first + len(tile)
                matrix[first:last] = tile
                starts.append((first, last))
                yield first, matrix[first:last]
            complete = True
            return
        for first, last in starts:
            yield first, matrix[first:last]

    return once
