"""The delta has the same bits in whatever order and with however many threads it is summed."""

from fractions import Fraction

import numpy
import pytest
from threadpoolctl import threadpool_limits

from loraformat.algebra import blas
from loraformat.algebra.blas import one_blas_thread
from loraformat.errors import UnsupportedError
from loraformat.nf4.kernels.merge_tile import merged_values
from loraformat.undo.fixed_point import fixed_point_bits, product, to_fixed_point
from tests.adapters.test_interval_code import TYPES, normal


def factors(rank, seed=0):
    random = numpy.random.default_rng(seed)
    spread = numpy.logspace(-9, 9, rank)
    left = random.standard_normal((65, rank)) * spread
    return left, random.standard_normal((rank, 130)) / spread[:, None]


@pytest.mark.parametrize("rank", [1, 2, 3, 16, 64, 65, 512])
def test_any_order_gives_the_same_bits(rank):
    left, right = factors(rank)
    made = product(left, right, exact=True)
    wanted = made.rows(0, 65)
    order = numpy.random.default_rng(1).permutation(rank)
    permuted = product(left[:, order], right[order], exact=True)
    assert numpy.array_equal(permuted.rows(0, 65), wanted)
    single = numpy.concatenate([made.rows(i, i + 1) for i in range(65)])
    assert numpy.array_equal(single, wanted)
    summed = sum(made.left[:, k : k + 1] * made.right[k] for k in range(rank))
    assert numpy.array_equal(summed.astype(numpy.float32), wanted)
    for count in (1, 2):
        with threadpool_limits(count):
            assert numpy.array_equal(made.rows(0, 65), wanted)


def test_two_callers_at_once_leave_blas_as_it_was():
    def threads():
        return {pool["num_threads"] for pool in known.info()}

    known = blas._controller().select(user_api="blas")
    with threadpool_limits(2, "blas"):
        first, second = one_blas_thread(), one_blas_thread()
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert threads() == {1}
        second.__exit__(None, None, None)
        assert threads() == {2}


def test_partial_sums_are_integers_below_2_to_the_53():
    for rank in (1, 2, 3, 16, 17, 512, 513):
        bits = fixed_point_bits(rank)
        assert rank * 2 ** (2 * bits) <= 2**53
        assert rank * 2 ** (2 * bits + 2) > 2**52


def test_it_is_as_accurate_as_float32():
    left, right = factors(64)  # of ranks as different as 10^9 and 10^-9, with equal products
    exact = left @ right
    error = numpy.linalg.norm(product(left, right, exact=True).rows(0, 65) - exact)
    assert error / numpy.linalg.norm(exact) < 3e-7


def test_values_are_rounded_to_even_multiples_exactly():
    row = numpy.array([[1.0, 0.625, 0.375, -0.125]])
    assert to_fixed_point(row, 1, 3).tolist() == [[1.0, 0.5, 0.5, 0.0]]
    assert to_fixed_point(numpy.array([[3.0e-300]]), 1, 20) == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e200])
def test_what_is_not_a_number_is_refused(value):
    bad = numpy.array([[value]])
    with pytest.raises(UnsupportedError):
        product(bad, bad, exact=True)


def test_empty_factors_give_zero():
    none = numpy.zeros((3, 0))
    assert not product(none, none.T, exact=True).rows(0, 3).any()


@pytest.mark.parametrize("dtype", TYPES.values(), ids=TYPES)
def test_merging_rounds_to_nearest(dtype):
    weight, delta = normal(4000).astype(dtype), normal(4000, seed=1) / 100
    merged = merged_values(weight, delta, None, dtype)
    for w, d, m in zip(weight[:200], delta, merged, strict=False):
        exact = Fraction(float(w)) + Fraction(float(d))
        for away in (numpy.inf, -numpy.inf):
            other = Fraction(float(numpy.nextafter(m, dtype.type(away))))
            off = abs(Fraction(float(m)) - exact)
            assert off <= abs(other - exact) * (1 + Fraction(1, 2**12))
