"""Thin factors: the quick way where it costs nothing, the careful one where it would."""

import numpy
import pytest

from loraformat.algebra import lora, thin_qr
from loraformat.algebra.thin_qr import factorize, tall_product, wide_product
from loraformat.tensors.arrays import numpy_dtype


@pytest.fixture
def random():
    return numpy.random.default_rng(7)


def is_quick(found, x):
    return found.basis is x


@pytest.mark.parametrize("shape", [(5, 5), (40, 3), (3000, 12), (1, 1), (4, 30, 6), (4, 1200, 40)])
@pytest.mark.parametrize("dtype", ["F32", "F64", "BF16", "F16"])
def test_factors(random, shape, dtype):
    x = random.standard_normal(shape).astype(numpy_dtype(dtype))
    found = factorize(x)
    q = found.basis.astype(float) @ found.inverse
    assert numpy.allclose(q @ found.r, x.astype(float), rtol=1e-5, atol=1e-12)
    assert numpy.allclose(q.mT @ q, numpy.eye(shape[-1]), atol=1e-9)
    if shape[-2] > 2 * shape[-1]:
        assert is_quick(found, x)


@pytest.mark.parametrize("lengths", [(1, 1e-30, 1e30), (1e-18, 1e18, 1e-5)])
def test_lengths_of_columns_cost_nothing(random, lengths):
    x = random.standard_normal((50, 3)) * lengths
    found = factorize(x)
    assert is_quick(found, x)
    exact = abs(numpy.linalg.qr(x).R.diagonal())
    assert numpy.allclose(abs(found.r.diagonal()) / exact, 1)


def hard_cases(random):
    x = random.standard_normal((60, 4))
    near = x.copy()
    near[:, 3] = near[:, 0] + 1e-6 * near[:, 3]
    zero = x.copy()
    zero[:, 2] = 0
    return {
        "nearly parallel": near, "zero column": zero, "all zero": numpy.zeros((9, 3)),
        "parallel": numpy.ones((9, 3)), "wide": x.T, "overflow": x * 1e160, "underflow": x * 1e-170,
    }  # fmt: skip


@pytest.mark.parametrize("case", hard_cases(numpy.random.default_rng()))
def test_hard_cases_take_the_careful_way(random, case):
    x = hard_cases(random)[case]
    found = factorize(x)
    assert not is_quick(found, x)
    scale = abs(x).max() or 1.0
    assert numpy.allclose(found.basis @ found.inverse @ (found.r / scale), x / scale)


@pytest.mark.parametrize("relative", [1e-1, 1e-3, 1e-5, 1e-7])
def test_cancellation_costs_no_accuracy(random, relative):
    """PiSSA's [A | A0], [B | -B0] of float32 factors: the delta is a small part of its terms."""
    b0, b = random.standard_normal((2, 300, 6), numpy.float32)
    a0, a = random.standard_normal((2, 6, 200), numpy.float32)
    b = numpy.concatenate([b0 + numpy.float32(relative) * b, -b0], 1)
    a = numpy.concatenate([a0 + numpy.float32(relative) * a, a0], 0)
    d = b.astype(float) @ a.astype(float)
    values = numpy.linalg.svd(d, compute_uv=False)
    small_b, small_a = lora.truncate(lora.core(b, a), 4, numpy.float64)
    error = numpy.linalg.norm(d - small_b @ small_a) / numpy.linalg.norm(values[4:])
    assert error - 1 < 1e-9
    assert numpy.allclose(lora.singular_values(b, a)[:6], values[:6], rtol=1e-7)


def test_one_bad_expert_makes_all_careful(random):
    x = random.standard_normal((3, 40, 4))
    x[1, :, 2] = 0
    found = factorize(x)
    assert not is_quick(found, x)
    assert numpy.allclose(found.basis @ found.inverse @ found.r, x)


@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (5000, 17), (3, 900, 20)])
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_products_are_rounded_once(random, shape, dtype):
    x = random.standard_normal(shape, numpy.float32)
    y = random.standard_normal((*shape[:-2], shape[-1], 5))
    exact = (x.astype(float) @ y).astype(numpy_dtype(dtype))
    assert numpy.array_equal(tall_product(x, y, exact.dtype), exact)
    assert numpy.array_equal(wide_product(y.mT, x.mT, exact.dtype), exact.mT)


class Watched(numpy.ndarray):
    """Remembers how many numbers were converted to float64 at once, at most."""

    largest = 0

    def astype(self, dtype, **options):
        if dtype is numpy.float64:
            Watched.largest = max(Watched.largest, self.size)
        return super().astype(dtype, **options)


def test_large_factors_are_never_converted_as_a_whole(random):
    b, a = (
        random.standard_normal(shape, numpy.float32).view(Watched)
        for shape in ((20_000, 8), (8, 30_000))
    )
    lora.truncate(lora.core(b, a), 4)
    assert 0 < Watched.largest <= thin_qr._TILE_ELEMENTS
