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

Every function takes leading dimensions (experts) and treats them one by one. Matrices of r × r
are too small for BLAS to share: its threads would wait for each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy
from numpy.typing import DTypeLike, NDArray

from loraformat.algebra.blas import one_blas_thread
from loraformat.algebra.thin_qr import factorize, gram, tall_product, wide_product

__all__ = [
    "Core",
    "Pair",
    "combine_factors",
    "core",
    "energy_rank",
    "pooled",
    "rounding_error",
    "singular_values",
    "truncate",
    "truncated_second_moment",
]

#: B and A.
Pair: TypeAlias = tuple[NDArray[Any], NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Core:
    """Decomposition of a low-rank delta into orthogonal parts, the most important first.

    D = left · diag(gains) · right. Without statistics this is the singular value
    decomposition and `gains` are `values`; with them, `values` are the root mean squares of
    the outputs' components, and the rows of `right` have norm 1 but are not orthogonal.
    Neither is held: left = columns · left_mixing, right = right_mixing · rows.

    Attributes
    ----------
    columns : array
        (out, r): B, or an orthonormal basis of its columns.
    left_mixing : array
        float64 (r, parts).
    rows : array
        (r, in): A, or an orthonormal basis of its rows.
    right_mixing : array
        float64 (parts, r).
    values : array
        float64 (parts,), descending: singular values of D, scaling included; with statistics
        the root of E|leftᵢᵀ D x|².
    gains : array
        float64 (parts,), ‖leftᵢᵀ D‖.
    mixing : array
        float64 (parts, r), with diag(gains) · right = mixing · A: how the new inner
        activations follow from the old ones.
    """

    columns: NDArray[Any]
    left_mixing: NDArray[Any]
    rows: NDArray[Any]
    right_mixing: NDArray[Any]
    values: NDArray[Any]
    gains: NDArray[Any]
    mixing: NDArray[Any]


@one_blas_thread()
def core(
    b: NDArray[Any],
    a: NDArray[Any],
    scaling: float = 1.0,
    second_moment: NDArray[Any] | None = None,
) -> Core:
    """Decompose scaling · B A without forming it.

    B is (out, r), A (r, in), of any floating dtype; the scaling may be negative. With the second
    moment E[z zᵀ] of z = A x, (r, r), the parts are ordered by what they add to the output for such
    inputs.

    Examples
    --------
    >>> b, a = numpy.array([[2.0], [0.0]]), numpy.array([[0.0, 3.0]])
    >>> core(b, a, 0.5).values
    array([3.])

    The second input is a hundred times as large as the first, which the singular values
    cannot know:

    >>> core(numpy.diag([2.0, 1.0]), numpy.eye(2), 1.0, numpy.diag([1.0, 1e4])).values
    array([100.,   2.])
    """
    outer, inner = factorize(b), factorize(a.mT)
    r_b, r_a = outer.r * scaling, inner.r
    if second_moment is not None:
        values, u = _principal(r_b, second_moment)
        mixing = u.mT @ r_b
        gains = numpy.linalg.norm(mixing @ r_a.mT, axis=-1)
        right = mixing / numpy.where(gains > 0, gains, 1.0)[..., None]
        return Core(outer.basis, outer.inverse @ u, a, right, values, gains, mixing)
    u, values, v = numpy.linalg.svd(r_b @ r_a.mT, full_matrices=False)
    right = v @ inner.inverse.mT
    return Core(outer.basis, outer.inverse @ u, inner.basis.mT, right, values, values, u.mT @ r_b)


def _principal(r_b: NDArray[Any], second_moment: NDArray[Any]) -> Pair:
    """Return root eigenvalues and eigenvectors of R S Rᵀ, descending."""
    moment = second_moment.astype(numpy.float64)
    outputs = r_b @ ((moment + moment.mT) / 2) @ r_b.mT
    eigenvalues, vectors = numpy.linalg.eigh(outputs)
    return numpy.sqrt(numpy.maximum(eigenvalues[..., ::-1], 0)), vectors[..., ::-1]


@one_blas_thread()
def singular_values(
    b: NDArray[Any],
    a: NDArray[Any],
    scaling: float = 1.0,
    second_moment: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """Return `Core.values` alone, of what `core` takes: half the work, as no vectors are formed.

    Examples
    --------
    >>> singular_values(numpy.eye(2) * 3, numpy.eye(2), -1.0)
    array([3., 3.])
    """
    r_b = factorize(b).r * scaling
    if second_moment is not None:
        return _principal(r_b, second_moment)[0]
    return numpy.linalg.svd(r_b @ factorize(a.mT).r.mT, compute_uv=False)


def pooled(values: NDArray[Any]) -> NDArray[Any]:
    """Return the pooled norms of the i-th parts of experts that share a rank.

    `values` are the singular values of one delta, (parts,), or of experts, (experts, parts).

    Examples
    --------
    >>> pooled(numpy.array([[3.0, 1.0], [4.0, 0.0]]))
    array([5., 1.])
    """
    norms: NDArray[Any] = numpy.linalg.norm(numpy.atleast_2d(values), axis=0)
    return norms


@one_blas_thread()
def truncate(decomposed: Core, rank: int, dtype: DTypeLike = numpy.float32) -> Pair:
    """Return the best factors of a rank: balanced, rows ordered by importance.

    Both factors carry √gain, so that neither over- nor underflows, and any prefix of their rows and
    columns is the best adapter of that lower rank. The scaling is inside: the adapter's alpha
    equals its rank. B (out, rank) and A (rank, in) are rounded to the dtype, to nearest even.
    """
    root = numpy.sqrt(decomposed.gains[..., :rank])
    left = decomposed.left_mixing[..., :rank] * root[..., None, :]
    right = decomposed.right_mixing[..., :rank, :] * root[..., None]
    b = tall_product(decomposed.columns, left, dtype)
    return b, wide_product(right, decomposed.rows, dtype)


def truncated_second_moment(
    decomposed: Core, second_moment: NDArray[Any], rank: int
) -> NDArray[Any]:
    """Return E[z' z'ᵀ] of z' = A' x, float32 (rank, rank), for the A' that `truncate` makes.

    A' = diag(gains)^-½ · mixing · A, and the moment follows by the same matrix from that of z = A
    x, so that a reduced adapter can be reduced again.
    """
    gains = decomposed.gains[..., :rank]
    largest = gains.max(-1, keepdims=True, initial=0)
    # Where nothing is left of D, nothing can be told of z' but that it is small: zero.
    inverse = 1 / numpy.sqrt(numpy.where(gains > 1e-14 * largest, gains, numpy.inf))
    change = inverse[..., None] * decomposed.mixing[..., :rank, :]
    moment: NDArray[Any] = change @ second_moment.astype(numpy.float64) @ change.mT
    return moment.astype(numpy.float32)


def energy_rank(values: NDArray[Any], energy: float) -> int:
    """Return the least rank that keeps a share, 0 to 1, of the squared norm.

    The singular values are descending.

    Examples
    --------
    >>> [energy_rank(numpy.array([3.0, 1.0]), energy) for energy in (0.9, 0.91)]
    [1, 2]
    """
    shares = numpy.cumsum(values.astype(numpy.float64) ** 2)
    if not len(shares) or shares[-1] == 0:
        return 0
    return int((shares < energy * shares[-1]).sum()) + 1 if energy > 0 else 0


@one_blas_thread()
def rounding_error(b: NDArray[Any], a: NDArray[Any], dtype: DTypeLike) -> float:
    """Return the relative error of a product due to rounding its factors.

    With B' and A' the rounded factors, B A − B' A' = [B − B', B'] · [A; A − A'], whose norm
    follows from two Gram matrices; nothing of the product's size is formed, and nothing cancels.

    Parameters
    ----------
    b : array
        (..., out, r), float32 or float64.
    a : array
        (..., r, in).
    dtype : dtype
        What they are rounded to, to nearest even.

    Returns
    -------
    float
        ‖B A − B' A'‖ / ‖B A‖ in the Frobenius norm, over all leading dimensions; 0 for a
        product of zero, not finite if B' or A' is not.

    Examples
    --------
    >>> b, a = numpy.array([[1 + 2**-12]]), numpy.ones((1, 4))
    >>> round(rounding_error(b, a, numpy.float16), 6), rounding_error(b, a, numpy.float32)
    (0.000244, 0.0)
    """
    whole = float((gram(b) * gram(a.mT)).sum())
    with numpy.errstate(over="ignore", invalid="ignore"):
        near_b, near_a = b.astype(dtype).astype(b.dtype), a.astype(dtype).astype(a.dtype)
        left = gram(numpy.concatenate([b - near_b, near_b], -1))
        right = gram(numpy.concatenate([a, a - near_a], -2).mT)
        return (max(float((left * right).sum()), 0.0) / whole) ** 0.5 if whole > 0 else 0.0


def combine_factors(terms: Sequence[tuple[float, NDArray[Any], NDArray[Any]]]) -> Pair:
    """Return factors of Σ wᵢ·Bᵢ Aᵢ exactly, by concatenation.

    Terms are (weight, b, a), their weights include each adapter's scaling; the factors are float64
    (out, Σ rᵢ) and (Σ rᵢ, in).
    """
    b = numpy.concatenate([weight * b.astype(numpy.float64) for weight, b, _ in terms], -1)
    return b, numpy.concatenate([a for _, _, a in terms], -2, dtype=numpy.float64)
