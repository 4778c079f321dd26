"""Low-rank deltas: factors, core matrix, optimal truncation by SVD.

Nothing here knows files. A delta D = s·B A with A (r, in) and B (out, r) is never formed:
everything follows from the r × r *core*.

    B = Q_b R_b,  Aᵀ = Q_a R_a,  R_b R_aᵀ = U S Vᵀ      (`thin_qr`, then an r × r SVD)
    D = (Q_b U) · s S · (Q_a V)ᵀ

so S, times the scaling, are the singular values of D, and keeping the k largest gives the
best approximation of rank k in the Frobenius and the spectral norm (Eckart & Young 1936).
Cost O((out + in) r²), computed in float64: float32 loses what nearly cancels. Q_b and Q_a are
not formed either: new factors are products of the old ones with r × k matrices.

If the second moment C = E[x xᵀ] of the inputs matters, the best M of rank k minimises
E‖(D − M) x‖² = ‖(D − M) C^½‖², and by the same theorem M = T_k T_kᵀ D with T_k the leading
eigenvectors of D C Dᵀ. With z = A x that matrix is s² B E[z zᵀ] Bᵀ: the r × r second moment
of z is all one has to know of the data, and no n × n matrix is ever built. The result is
that of whitening (SVD-LLM, Wang 2024) without its inverse.

Every function takes leading dimensions (experts) and treats them one by one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from loraformat.algebra.thin_qr import factorize, gram, tall_product, wide_product

__all__ = [
    "Core",
    "combine_factors",
    "core",
    "energy_rank",
    "rounding_error",
    "singular_values",
    "truncate",
    "truncated_second_moment",
]


@dataclass(frozen=True, slots=True)
class Core:
    """A low-rank delta as a sum of orthogonal parts, the most important first.

    D = left · diag(gains) · right. Without statistics this is the singular value
    decomposition and `gains` are `values`; with them, `values` are the root mean squares of
    the outputs' components, and the rows of `right` have norm 1 but are not orthogonal.
    Neither is held: left = columns · left_mixing, right = right_mixing · rows.

    Attributes
    ----------
    columns : torch.Tensor
        (out, r): B, or an orthonormal basis of its columns.
    left_mixing : torch.Tensor
        float64 (r, parts).
    rows : torch.Tensor
        (r, in): A, or an orthonormal basis of its rows.
    right_mixing : torch.Tensor
        float64 (parts, r).
    values : torch.Tensor
        float64 (parts,), descending: singular values of D, scaling included; with statistics
        the root of E|leftᵢᵀ D x|².
    gains : torch.Tensor
        float64 (parts,), ‖leftᵢᵀ D‖.
    mixing : torch.Tensor
        float64 (parts, r), with diag(gains) · right = mixing · A: how the new inner
        activations follow from the old ones.
    """

    columns: torch.Tensor
    left_mixing: torch.Tensor
    rows: torch.Tensor
    right_mixing: torch.Tensor
    values: torch.Tensor
    gains: torch.Tensor
    mixing: torch.Tensor

    @property
    def left(self) -> torch.Tensor:
        """float64 (out, parts), orthonormal columns."""
        return tall_product(self.columns, self.left_mixing, torch.float64)

    @property
    def right(self) -> torch.Tensor:
        """float64 (parts, in), rows of norm 1."""
        return wide_product(self.right_mixing, self.rows, torch.float64)

    @property
    def squared_norm(self) -> float:
        """‖D‖² in the Frobenius norm."""
        return float(self.gains.square().sum())


def core(
    b: torch.Tensor,
    a: torch.Tensor,
    scaling: float = 1.0,
    second_moment: torch.Tensor | None = None,
) -> Core:
    """Decompose scaling · B A without forming it.

    Parameters
    ----------
    b : torch.Tensor
        (out, r), any floating dtype.
    a : torch.Tensor
        (r, in).
    scaling : float
        May be negative.
    second_moment : torch.Tensor, optional
        E[z zᵀ] of z = A x, (r, r). With it the parts are ordered by what they add to the
        output for such inputs.

    Returns
    -------
    Core

    Examples
    --------
    >>> b, a = torch.tensor([[2.0], [0.0]]), torch.tensor([[0.0, 3.0]])
    >>> core(b, a, 0.5).values
    tensor([3.], dtype=torch.float64)

    The second input is a hundred times as large as the first, which the singular values
    cannot know:

    >>> eye = torch.eye(2)
    >>> core(torch.diag(torch.tensor([2.0, 1.0])), eye, 1.0, torch.tensor([1.0, 1e4]).diag()).values
    tensor([100.,   2.], dtype=torch.float64)
    """
    outer, inner = factorize(b), factorize(a.mT)
    r_b, r_a = outer.r * scaling, inner.r
    if second_moment is not None:
        values, u = _principal(r_b, second_moment)
        mixing = u.mT @ r_b
        gains = (mixing @ r_a.mT).norm(dim=-1)
        right = mixing / torch.where(gains > 0, gains, 1.0)[..., None]
        return Core(outer.basis, outer.inverse @ u, a, right, values, gains, mixing)
    u, values, v = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
    right = v @ inner.inverse.mT
    return Core(outer.basis, outer.inverse @ u, inner.basis.mT, right, values, values, u.mT @ r_b)


def _principal(r_b: torch.Tensor, second_moment: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return root eigenvalues and eigenvectors of R S Rᵀ, descending."""
    moment = second_moment.double()
    outputs = r_b @ ((moment + moment.mT) / 2) @ r_b.mT
    eigenvalues, vectors = torch.linalg.eigh(outputs)
    return eigenvalues.flip(-1).clamp(min=0).sqrt(), vectors.flip(-1)


def singular_values(
    b: torch.Tensor,
    a: torch.Tensor,
    scaling: float = 1.0,
    second_moment: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return `Core.values` alone: half the work, as no vectors are formed.

    Parameters
    ----------
    b, a, scaling, second_moment
        As in `core`.

    Examples
    --------
    >>> singular_values(torch.eye(2) * 3, torch.eye(2), -1.0)
    tensor([3., 3.], dtype=torch.float64)
    """
    r_b = factorize(b).r * scaling
    if second_moment is not None:
        return _principal(r_b, second_moment)[0]
    values: torch.Tensor = torch.linalg.svdvals(r_b @ factorize(a.mT).r.mT)
    return values


def truncate(
    decomposed: Core, rank: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the best factors of a rank: balanced, rows ordered by importance.

    Both factors carry √gain, so that neither over- nor underflows, and any prefix of their
    rows and columns is the best adapter of that lower rank. The scaling is inside: the
    adapter's alpha equals its rank.

    Parameters
    ----------
    decomposed : Core
    rank : int
        At most the number of values.
    dtype : torch.dtype
        Of the result; rounded to nearest even.

    Returns
    -------
    b : torch.Tensor
        (out, rank).
    a : torch.Tensor
        (rank, in).
    """
    root = decomposed.gains[..., :rank].sqrt()
    left = decomposed.left_mixing[..., :rank] * root[..., None, :]
    right = decomposed.right_mixing[..., :rank, :] * root[..., None]
    b = tall_product(decomposed.columns, left, dtype)
    return b, wide_product(right, decomposed.rows, dtype)


def truncated_second_moment(
    decomposed: Core, second_moment: torch.Tensor, rank: int
) -> torch.Tensor:
    """Return E[z' z'ᵀ] of z' = A' x, for the A' that `truncate` makes.

    A' = diag(gains)^-½ · mixing · A, and the moment follows by the same matrix, so that a
    reduced adapter can be reduced again.

    Parameters
    ----------
    decomposed : Core
    second_moment : torch.Tensor
        E[z zᵀ] of z = A x.
    rank : int

    Returns
    -------
    torch.Tensor
        float32 (rank, rank).
    """
    gains = decomposed.gains[..., :rank]
    largest = gains.amax(-1, keepdim=True) if rank else gains
    # Where nothing is left of D, nothing can be told of z' but that it is small: zero.
    inverse = torch.where(gains > 1e-14 * largest, gains, torch.inf).rsqrt()
    change = inverse[..., None] * decomposed.mixing[..., :rank, :]
    return (change @ second_moment.double() @ change.mT).float().contiguous()


def energy_rank(values: torch.Tensor, energy: float) -> int:
    """Return the least rank that keeps a share of the squared norm.

    Parameters
    ----------
    values : torch.Tensor
        Singular values, descending.
    energy : float
        From 0 to 1.

    Examples
    --------
    >>> energy_rank(torch.tensor([3.0, 1.0]), 0.9), energy_rank(torch.tensor([3.0, 1.0]), 0.91)
    (1, 2)
    """
    shares = values.double().square().cumsum(0)
    if not len(shares) or shares[-1] == 0:
        return 0
    return int((shares < energy * shares[-1]).sum()) + 1 if energy > 0 else 0


def rounding_error(b: torch.Tensor, a: torch.Tensor, dtype: torch.dtype) -> float:
    """Return the relative error that rounding the factors of a product leaves in it.

    With B' and A' the rounded factors, B A − B' A' = [B − B', B'] · [A; A − A'], whose norm
    follows from two Gram matrices; nothing of the product's size is formed, and nothing cancels.

    Parameters
    ----------
    b : torch.Tensor
        (..., out, r), float32 or float64.
    a : torch.Tensor
        (..., r, in).
    dtype : torch.dtype
        What they are rounded to, to nearest even.

    Returns
    -------
    float
        ‖B A − B' A'‖ / ‖B A‖ in the Frobenius norm, over all leading dimensions; 0 for a
        product of zero.

    Examples
    --------
    >>> b, a = torch.tensor([[1.0 + 2**-9]]), torch.ones(1, 4)
    >>> round(rounding_error(b, a, torch.bfloat16), 6), rounding_error(b, a, torch.float32)
    (0.001949, 0.0)
    """
    whole = float((gram(b) * gram(a.mT)).sum())
    near_b, near_a = b.to(dtype).to(b.dtype), a.to(dtype).to(a.dtype)
    left = gram(torch.cat([b - near_b, near_b], dim=-1))
    right = gram(torch.cat([a, a - near_a], dim=-2).mT)
    return (max(float((left * right).sum()), 0.0) / whole) ** 0.5 if whole > 0 else 0.0


def combine_factors(
    terms: list[tuple[float, torch.Tensor, torch.Tensor]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return factors of Σ wᵢ·Bᵢ Aᵢ exactly, by concatenation.

    Parameters
    ----------
    terms : list of (weight, b, a)
        Weights include each adapter's scaling.

    Returns
    -------
    b : torch.Tensor
        float64 (out, Σ rᵢ).
    a : torch.Tensor
        float64 (Σ rᵢ, in).
    """
    b = torch.cat([weight * b.double() for weight, b, _ in terms], dim=-1)
    a = torch.cat([a.double() for _, _, a in terms], dim=-2)
    return b, a
