"""Low-rank approximation of a matrix that is only seen row tile by row tile.

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

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

__all__ = ["Approximation", "Tiles", "block_krylov"]

#: Called once per pass: yields (first row, tile), tiles in float32, in order.
Tiles = Callable[[], Iterator[tuple[int, torch.Tensor]]]

#: Directions weaker than this share of a block's squared norm are nothing but rounding, and too
#: small to be scaled up. Weaker ones than float32 resolves stay: they are random, as Ω was.
_ROUNDING = 1e-18
#: Narrower blocks converge slowly and are hardly cheaper: a tile is read for either.
_NARROWEST = 16


@dataclass(frozen=True, slots=True)
class Approximation:
    """The leading singular parts of a matrix, and what they are worth.

    Attributes
    ----------
    left : torch.Tensor
        float32 (m, c): left singular vectors times their values.
    values : torch.Tensor
        float64 (c,), descending: approximate singular values, each at most the true one.
    right : torch.Tensor
        float32 (c, n), orthonormal rows.
    squared_norm : float
        ‖D‖², of the whole matrix.
    """

    left: torch.Tensor
    values: torch.Tensor
    right: torch.Tensor
    squared_norm: float

    def captured(self, rank: int) -> float:
        """Return the share of ‖D‖² that the first `rank` parts hold; 1 for D = 0."""
        kept = float(self.values[:rank].square().sum())
        return min(kept / self.squared_norm, 1.0) if self.squared_norm else 1.0

    def factors(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return balanced float32 factors (m, rank) and (rank, n) of the best part."""
        root = self.values[:rank].sqrt()
        inverse = torch.where(root > 0, 1 / root, 0.0)
        b = (self.left[:, :rank] * inverse).float()
        a = (root[:, None] * self.right[:rank]).float()
        return b.contiguous(), a.contiguous()


def block_krylov(
    tiles: Tiles, shape: tuple[int, int], block: int, *, passes: int = 4, seed: int = 0
) -> Approximation:
    """Approximate a matrix from ``passes + 1`` looks at it.

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
    >>> d = torch.outer(torch.arange(4.0), torch.ones(3))
    >>> found = block_krylov(lambda: iter([(0, d)]), (4, 3), 1)
    >>> round(found.captured(1), 6), [round(v, 4) for v in found.values[:1].tolist()]
    (1.0, [6.4807])
    """
    m, n = shape
    random = torch.Generator().manual_seed(seed)
    start = torch.randn(n, min(max(block, _NARROWEST), m, n), generator=random)
    z = torch.linalg.qr(start).Q
    basis, images = torch.empty(n, 0), torch.empty(m, 0)
    squared_norm = 0.0
    for step in range(passes + 1):
        last = step == passes
        y, following, squared_norm = _look(tiles, m, z, last)
        basis, images = torch.cat([basis, z], 1), torch.cat([images, y], 1)
        if last or basis.shape[1] >= n:
            break
        z = _orthonormal(following, basis)
        if not z.shape[1]:
            break  # the span holds all of D
    return _principal(images, basis, squared_norm)


def _look(
    tiles: Tiles, rows: int, z: torch.Tensor, last: bool
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Return D Z, DᵀD Z and ‖D‖² from one pass."""
    y = torch.empty(rows, z.shape[1])
    following, squared_norm = torch.zeros_like(z), 0.0
    for first, tile in tiles():
        piece = y[first : first + len(tile)]
        torch.mm(tile, z, out=piece)
        if not last:
            following.addmm_(tile.T, piece)
        # Rows one by one in float32, their sum in float64: no digit of the certificate is lost.
        squared_norm += float(torch.linalg.vector_norm(tile, dim=1).double().square().sum())
    return y, following, squared_norm


def _orthonormal(z: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """Return an orthonormal basis of what a block adds to another basis."""
    scale = float(z.double().square().sum())
    for _ in range(2):
        z = z - basis @ (basis.T @ z)
    eigenvalues, vectors = torch.linalg.eigh(z.double().T @ z.double())
    kept = eigenvalues > _ROUNDING * scale
    kept[: max(0, z.shape[1] + basis.shape[1] - len(basis))] = False  # never more than n in all
    z = (z.double() @ (vectors[:, kept] * eigenvalues[kept].rsqrt())).float()
    z = z - basis @ (basis.T @ z)
    q: torch.Tensor = torch.linalg.qr(z).Q
    return q


def _principal(images: torch.Tensor, basis: torch.Tensor, squared_norm: float) -> Approximation:
    """Rotate W Pᵀ to singular order, through the small Gram matrix WᵀW in float64."""
    wide = images.double()
    eigenvalues, vectors = torch.linalg.eigh(wide.T @ wide)
    kept = min(images.shape)
    rotation = vectors.flip(-1)[:, :kept].float()
    values = eigenvalues.flip(-1)[:kept].clamp(min=0).sqrt()
    return Approximation(images @ rotation, values, (basis @ rotation).T, squared_norm)
