"""The delta has the same bits in whatever order and with however many threads it is summed."""

from fractions import Fraction

import pytest
import torch

from loraformat.errors import UnsupportedError
from loraformat.undo.fixed_point import fixed_point_bits, merge_values, product, to_fixed_point


def factors(rank, seed=0):
    generator = torch.Generator().manual_seed(seed)
    spread = torch.logspace(-9, 9, rank, dtype=torch.float64)
    left = torch.randn(65, rank, generator=generator, dtype=torch.float64) * spread
    return left, torch.randn(rank, 130, generator=generator, dtype=torch.float64) / spread[:, None]


@pytest.mark.parametrize("rank", [1, 2, 3, 16, 64, 65, 512])
def test_any_order_gives_the_same_bits(rank):
    left, right = factors(rank)
    made = product(left, right, exact=True)
    wanted = made.rows(0, 65)
    order = torch.randperm(rank, generator=torch.Generator().manual_seed(1))
    permuted = product(left[:, order], right[order], exact=True)
    assert torch.equal(permuted.rows(0, 65), wanted)
    assert torch.equal(torch.cat([made.rows(i, i + 1) for i in range(65)]), wanted)
    summed = sum(made.left[:, k : k + 1] * made.right[k] for k in range(rank))
    assert torch.equal(summed.float(), wanted)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            assert torch.equal(made.rows(0, 65), wanted)
    finally:
        torch.set_num_threads(threads)


def test_partial_sums_are_integers_below_2_to_the_53():
    for rank in (1, 2, 3, 16, 17, 512, 513):
        bits = fixed_point_bits(rank)
        assert rank * 2 ** (2 * bits) <= 2**53
        assert rank * 2 ** (2 * bits + 2) > 2**52


def test_it_is_as_accurate_as_float32():
    left, right = factors(64)  # of ranks as different as 10^9 and 10^-9, with equal products
    exact = left @ right
    error = (product(left, right, exact=True).rows(0, 65) - exact).norm() / exact.norm()
    assert error < 3e-7


def test_values_are_rounded_to_even_multiples_exactly():
    row = torch.tensor([[1.0, 0.625, 0.375, -0.125]], dtype=torch.float64)
    assert to_fixed_point(row, 1, 3).tolist() == [[1.0, 0.5, 0.5, 0.0]]
    tiny = torch.tensor([[3.0e-300]], dtype=torch.float64)
    assert float(to_fixed_point(tiny, 1, 20)) == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e200])
def test_what_is_not_a_number_is_refused(value):
    bad = torch.tensor([[value]], dtype=torch.float64)
    with pytest.raises(UnsupportedError):
        product(bad, bad, exact=True)


def test_empty_factors_give_zero():
    none = torch.zeros(3, 0, dtype=torch.float64)
    assert not product(none, none.T, exact=True).rows(0, 3).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_merging_rounds_to_nearest(dtype):
    weight, delta = torch.randn(4000).to(dtype), torch.randn(4000) * 0.01
    merged = merge_values(weight, delta, None, dtype)
    for w, d, m in zip(weight.tolist()[:200], delta.tolist(), merged.tolist(), strict=False):
        exact = Fraction(w) + Fraction(d)
        near = torch.tensor(m, dtype=dtype)
        for away in (float("inf"), float("-inf")):
            other = Fraction(float(torch.nextafter(near, torch.tensor(away, dtype=dtype))))
            assert abs(Fraction(m) - exact) <= abs(other - exact) * (1 + Fraction(1, 2**12))
