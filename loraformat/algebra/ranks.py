"""Rank selection by energy, parameter budget or noise threshold.

Everything here works on singular values, descending, and knows neither factors nor files.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from typing import Any

import numpy
from numpy.typing import NDArray

__all__ = ["allocate", "entropy_rank", "noise_edge", "rounding_noise", "stable_rank"]


def allocate(
    values: Sequence[NDArray[Any]], costs: Sequence[int], budget: int, cap: int | None = None
) -> list[int]:
    r"""Spend a global budget of parameters on the most valuable singular values.

    Maximises :math:`\sum_l \sum_{i \le r_l} \sigma_{l,i}^2` subject to
    :math:`\sum_l c_l r_l \le P`, where a rank more costs module l
    :math:`c_l = m_l + n_l` parameters. The value of a rank falls within a module, so greedy
    by :math:`\sigma^2 / c` is optimal for equal costs, and up to less than one item
    otherwise (the relaxation of the knapsack problem, Dantzig 1957).

    Parameters
    ----------
    values : sequence of array
        Per module, descending.
    costs : sequence of int
        Parameters per rank.
    budget : int
        Parameters in all.
    cap : int, optional
        Largest rank of a module.

    Returns
    -------
    list of int
        A rank per module; zeros are possible, values of zero are never bought.

    Examples
    --------
    >>> allocate([numpy.array([3.0, 1.0]), numpy.array([2.0, 1.9])], [10, 10], 30)
    [1, 2]
    """
    ranks = [0] * len(values)
    worth = [[float(v) ** 2 / cost for v in s] for s, cost in zip(values, costs, strict=True)]
    heap = [(-gains[0], i) for i, gains in enumerate(worth) if gains and gains[0] > 0]
    heapq.heapify(heap)
    while heap:
        _, i = heapq.heappop(heap)
        if costs[i] > budget:
            continue  # too dear now and later; cheaper modules may still fit
        budget -= costs[i]
        ranks[i] += 1
        rank = ranks[i]
        if rank < len(worth[i]) and worth[i][rank] > 0 and (cap is None or rank < cap):
            heapq.heappush(heap, (-worth[i][rank], i))
    return ranks


def stable_rank(values: NDArray[Any]) -> float:
    """Return the stable rank ‖D‖_F² / ‖D‖₂² (Rudelson 2007).

    Examples
    --------
    >>> stable_rank(numpy.array([2.0, 2.0, 1.0]))
    2.25
    """
    squares = values.astype(numpy.float64) ** 2
    return float(squares.sum() / squares[0]) if len(values) and squares[0] > 0 else 0.0


def entropy_rank(values: NDArray[Any]) -> float:
    r"""Return the effective rank :math:`\exp(-\sum p_i \ln p_i)`, p = σ / Σσ (Roy 2007).

    Examples
    --------
    >>> round(entropy_rank(numpy.array([1.0, 1.0, 0.0])), 6)
    2.0
    """
    shares = values[values > 0].astype(numpy.float64)
    shares /= shares.sum()
    return math.exp(-float((shares * numpy.log(shares)).sum())) if shares.size else 0.0


def rounding_noise(mean_square_step: float) -> float:
    """Return the standard deviation σ of rounding, from the mean square of the steps.

    The error is uniform over one step, so its variance is step² / 12.

    Examples
    --------
    >>> round(rounding_noise(12.0), 6)
    1.0
    """
    return math.sqrt(mean_square_step / 12)


def noise_edge(sigma: float, rows: int, columns: int) -> float:
    r"""Return the largest singular value that pure noise would have.

    Independent entries of deviation σ have singular values up to
    :math:`\sigma (\sqrt m + \sqrt n)` (Marchenko & Pastur 1967); the margin
    :math:`1 + \min(m, n)^{-2/3}` covers the fluctuation of the largest (Tracy & Widom 1996)
    in more than 99 of 100 matrices. What lies above is signal.

    Parameters
    ----------
    sigma : float
    rows, columns : int

    Examples
    --------
    >>> round(noise_edge(1.0, 100, 100), 2)
    20.93
    """
    margin = 1 + math.pow(max(min(rows, columns), 1), -2 / 3)
    return sigma * (math.sqrt(rows) + math.sqrt(columns)) * margin
