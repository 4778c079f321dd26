"""Products by either library are the same to rounding, whatever processor the tests run on."""

import pytest
import torch

from loraformat.train.engine import gemm


@pytest.fixture(params=[True, False], ids=["oneDNN", "torch"])
def library(request, monkeypatch):
    there = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    monkeypatch.setattr(gemm, "_prefers_onednn", lambda: request.param and there)


@pytest.mark.parametrize("rows", [1, 2, 33, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_products_are_those_of_float64(library, rows, dtype):
    chance = torch.Generator().manual_seed(rows)
    x, w = (torch.randn(s, generator=chance).to(dtype) for s in ((rows, 96), (80, 96)))
    exact = x.double() @ w.double().T
    into = torch.full((rows, 100), 7.0, dtype=dtype)
    wide = torch.empty(rows, 80, dtype=torch.float32)
    bound = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 1e-2}[dtype]
    for found in (
        gemm.times_transposed(x, w),
        gemm.times(x, w.T),
        gemm.times(x, w.T.contiguous()),
        gemm.times_transposed(x, w, out=into[:, 10:90]),
    ):
        assert found.dtype == dtype
        assert (found.double() - exact).norm() < bound * exact.norm()
    assert torch.equal(into[:, 10:90], found) and (into[:, :10] == 7).all()
    gemm.times_transposed(x, w, out=wide)
    assert (wide.double() - exact).norm() < max(bound, 1e-5) * exact.norm()


def test_rows_are_padded_only_for_oneDNN(library):
    assert len(gemm.even_rows(torch.ones(33, 2, dtype=torch.float64))) == 33
    assert len(gemm.even_rows(torch.ones(33, 2, dtype=torch.bfloat16))) == 34
    assert len(gemm.even_rows(torch.ones(33, 2))) == (34 if gemm._prefers_onednn() else 33)
    assert not gemm.even_rows(torch.ones(33, 2, dtype=torch.bfloat16))[33].any()
