"""Thin factors: the quick way where it costs nothing, the careful one where it would."""

import pytest
import torch

from loraformat.algebra import lora, thin_qr
from loraformat.algebra.thin_qr import factorize, tall_product, wide_product


@pytest.fixture
def random():
    return torch.Generator().manual_seed(7)


def is_quick(found, x):
    return found.basis is x


@pytest.mark.parametrize("shape", [(5, 5), (40, 3), (3000, 12), (1, 1), (4, 30, 6), (4, 1200, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_factors(random, shape, dtype):
    x = torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)
    found = factorize(x)
    q = found.basis.double() @ found.inverse
    assert torch.allclose(q @ found.r, x.double(), atol=1e-12)
    eye = torch.eye(shape[-1], dtype=torch.float64)
    assert torch.allclose(q.mT @ q, eye.expand(*shape[:-2], -1, -1), atol=1e-9)
    if shape[-2] > 2 * shape[-1]:
        assert is_quick(found, x)


@pytest.mark.parametrize("lengths", [(1, 1e-30, 1e30), (1e-18, 1e18, 1e-5)])
def test_lengths_of_columns_cost_nothing(random, lengths):
    x = torch.randn(50, 3, generator=random, dtype=torch.float64) * torch.tensor(lengths)
    found = factorize(x)
    assert is_quick(found, x)
    exact = torch.linalg.qr(x).R.diagonal().abs()
    assert torch.allclose(found.r.diagonal().abs() / exact, torch.ones(3, dtype=torch.float64))


def hard_cases(random):
    x = torch.randn(60, 4, generator=random, dtype=torch.float64)
    near = x.clone()
    near[:, 3] = near[:, 0] + 1e-6 * near[:, 3]
    zero = x.clone()
    zero[:, 2] = 0
    return {
        "nearly parallel": near, "zero column": zero, "all zero": torch.zeros(9, 3),
        "parallel": torch.ones(9, 3), "wide": x.T, "overflow": x * 1e160, "underflow": x * 1e-170,
    }  # fmt: skip


@pytest.mark.parametrize("case", hard_cases(torch.Generator()))
def test_hard_cases_take_the_careful_way(random, case):
    x = hard_cases(random)[case]
    found = factorize(x)
    assert not is_quick(found, x)
    wide = x.double()
    scale = float(wide.abs().max()) or 1.0
    assert torch.allclose(found.basis @ found.inverse @ (found.r / scale), wide / scale)


@pytest.mark.parametrize("relative", [1e-1, 1e-3, 1e-5, 1e-7])
def test_cancellation_costs_no_accuracy(random, relative):
    """PiSSA's [A | A0], [B | -B0] of float32 factors: the delta is a small part of its terms."""
    b0 = torch.randn(300, 6, generator=random)
    a0 = torch.randn(6, 200, generator=random)
    b1 = b0 + relative * torch.randn(b0.shape, generator=random)
    a1 = a0 + relative * torch.randn(a0.shape, generator=random)
    b, a = torch.cat([b1, -b0], 1), torch.cat([a1, a0], 0)
    d = b.double() @ a.double()
    values = torch.linalg.svdvals(d)
    small_b, small_a = lora.truncate(lora.core(b, a), 4, torch.float64)
    error = (d - small_b @ small_a).norm() / values[4:].norm()
    assert error - 1 < 1e-9
    assert torch.allclose(lora.singular_values(b, a)[:6], values[:6], rtol=1e-7)


def test_one_bad_expert_makes_all_careful(random):
    x = torch.randn(3, 40, 4, generator=random)
    x[1, :, 2] = 0
    found = factorize(x)
    assert not is_quick(found, x)
    assert torch.allclose(found.basis @ found.inverse @ found.r, x.double())


@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (5000, 17), (3, 900, 20)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_rounded_once(random, shape, dtype):
    x = torch.randn(shape, generator=random)
    y = torch.randn(*shape[:-2], shape[-1], 5, generator=random, dtype=torch.float64)
    exact = (x.double() @ y).to(dtype)
    assert torch.equal(tall_product(x, y, dtype), exact)
    assert torch.equal(wide_product(y.mT, x.mT, dtype), exact.mT)


def test_large_factors_are_never_converted_as_a_whole(random, monkeypatch):
    largest = 0
    double = torch.Tensor.double

    def watched(tensor):
        nonlocal largest
        largest = max(largest, tensor.numel())
        return double(tensor)

    monkeypatch.setattr(torch.Tensor, "double", watched)
    b, a = torch.randn(20_000, 8, generator=random), torch.randn(8, 30_000, generator=random)
    lora.truncate(lora.core(b, a), 4)
    assert 0 < largest <= thin_qr._TILE_ELEMENTS
