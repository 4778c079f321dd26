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
output. All steps are monotone in w, which is what
`loraformat.undo.interval_code` builds on. Nothing here knows files.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from loraformat.errors import UnsupportedError

__all__ = ["Product", "fixed_point_bits", "merge_values", "product", "to_fixed_point"]

_MANTISSA_BITS = 53
#: Largest exponent of a factor, so that a product of two neither over- nor underflows.
_MAX_EXPONENT = 400
_FLOAT16_MAX = 65504.0


def fixed_point_bits(rank: int) -> int:
    """Return how many bits the integers may have for a sum of ``rank`` products.

    Examples
    --------
    >>> fixed_point_bits(16), fixed_point_bits(512), fixed_point_bits(1)
    (24, 22, 26)
    """
    return (_MANTISSA_BITS - max(rank - 1, 0).bit_length()) // 2


def to_fixed_point(factor: torch.Tensor, dim: int, bits: int) -> torch.Tensor:
    """Round a factor to integers times one power of two per row or column.

    Parameters
    ----------
    factor : torch.Tensor
        float64, two dimensions.
    dim : int
        The dimension that shares a power of two: 1 for rows, 0 for columns.
    bits : int
        Each value becomes an integer of at most 2^bits times the power.

    Raises
    ------
    UnsupportedError
        If a value is not finite, or beyond 2^400.

    Examples
    --------
    >>> to_fixed_point(torch.tensor([[1.0, 0.3]], dtype=torch.float64), 1, 2)
    tensor([[1.0000, 0.5000]], dtype=torch.float64)
    """
    step = _exponents(factor, dim) - bits
    return (factor * _power_of_two(-step)).round() * _power_of_two(step)


def _power_of_two(exponent: torch.Tensor) -> torch.Tensor:
    """Return 2^exponent as float64, from its bits: torch.ldexp computes it in float32."""
    return ((exponent + 1023) << 52).view(torch.float64)


@dataclass(frozen=True, slots=True)
class Product:
    """A low-rank matrix, of which any rows can be asked for.

    Attributes
    ----------
    left : torch.Tensor
        (rows, r), float64 in fixed point, or float32.
    right : torch.Tensor
        (r, columns).
    """

    left: torch.Tensor
    right: torch.Tensor

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Return rows ``start`` to ``stop`` in float32, rounded to nearest even."""
        return (self.left[start:stop] @ self.right).float()


def product(left: torch.Tensor, right: torch.Tensor, *, exact: bool) -> Product:
    """Prepare a product.

    Parameters
    ----------
    left : torch.Tensor
        float64 (rows, r).
    right : torch.Tensor
        float64 (r, columns).
    exact : bool
        The same bits on every machine, at the cost of a float64 product; in float32 if not.

    Examples
    --------
    >>> ones = torch.ones(2, 3, dtype=torch.float64)
    >>> product(ones, ones.T, exact=True).rows(0, 1)
    tensor([[3., 3.]])
    """
    if not exact:
        return Product(left.float(), right.float())
    bits = fixed_point_bits(left.shape[1])
    left, right = _balanced(left, right)
    return Product(to_fixed_point(left, 1, bits), to_fixed_point(right, 0, bits))


def _balanced(left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Give the k-th column and the k-th row one magnitude, by powers of two: no product changes.

    Without it, a rank with a large column and a tiny row would leave no bits to its neighbours.
    """
    shift = (_exponents(left, 0) - _exponents(right, 1).T) // 2
    return left * _power_of_two(-shift), right * _power_of_two(shift).T


def _exponents(factor: torch.Tensor, dim: int) -> torch.Tensor:
    """Return the least e with all values below 2^e, clamped, per row or column."""
    largest = factor.abs().amax(dim, keepdim=True) if factor.numel() else factor.sum(dim, True)
    if not bool(torch.isfinite(largest).all()):
        raise UnsupportedError("an adapter's factor holds NaN or infinity")
    exponent = torch.frexp(largest).exponent.long()
    if bool((exponent > _MAX_EXPONENT).any()):
        raise UnsupportedError(f"an adapter's factor is beyond 2^{_MAX_EXPONENT}")
    return exponent.clamp(min=-_MAX_EXPONENT)


def merge_values(
    weight: torch.Tensor, delta: torch.Tensor, gain: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """Return round(g · (w + d)): the merged weight in the dtype of the output.

    Parameters
    ----------
    weight : torch.Tensor
        float32, bfloat16 or float16.
    delta : torch.Tensor
        float32.
    gain : torch.Tensor or None
        float32, of a shape that broadcasts: DoRA's m / ‖W + D‖. None is 1.
    dtype : torch.dtype
        float16 saturates at ±65504; NaN stays NaN.

    Examples
    --------
    >>> merge_values(torch.tensor([1.0]), torch.tensor([1e-3]), None, torch.bfloat16)
    tensor([1.], dtype=torch.bfloat16)
    """
    total = weight.float() + delta
    if gain is not None:
        total = total * gain
    if dtype == torch.float16:
        total = total.clamp(-_FLOAT16_MAX, _FLOAT16_MAX)
    return total.to(dtype)
