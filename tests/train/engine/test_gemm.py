"""Products by either library are the same to rounding, whatever processor the tests run on."""

import pytest
import torch

from loraformat.train.engine import matmul
from loraformat.train.engine.linear import frozen_product
from loraformat.train.engine.matrix import DenseMatrix


@pytest.fixture(params=[True, False], ids=["oneDNN", "torch"])
def library(request, monkeypatch):
    there = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    monkeypatch.setattr(matmul, "_prefers_onednn", lambda: request.param and there)


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
        matmul.times_transposed(x, w),
        matmul.times(x, w.T),
        matmul.times(x, w.T.contiguous()),
        matmul.times_transposed(x, w, out=into[:, 10:90]),
    ):
        assert found.dtype == dtype
        assert (found.double() - exact).norm() < bound * exact.norm()
    assert torch.equal(into[:, 10:90], found) and (into[:, :10] == 7).all()
    matmul.times_transposed(x, w, out=wide)
    assert (wide.double() - exact).norm() < max(bound, 1e-5) * exact.norm()


#: Second factors, by how they lie in a wider matrix.
LAYOUTS = {
    "one piece": lambda wide: wide[:96, :80].contiguous(),
    "one piece, turned": lambda wide: wide[:96, :80].T.contiguous().T,
    "some columns": lambda wide: wide[:96, 8:88],
    "some columns, turned": lambda wide: wide.T[:96, 8:88],
    "every other number": lambda wide: wide[::2, ::2][:96, :80],
    "one row for all": lambda wide: wide[:1, :80].expand(96, 80),
    "one column for all": lambda wide: wide[:96, :1].expand(96, 80),
    "rows that overlap": lambda wide: wide.as_strided((96, 80), (1, 1)),
    "one column": lambda wide: wide[:96, :1],
    "one row": lambda wide: wide[:1, :80],
}


@pytest.fixture
def factors(monkeypatch):
    """The second factors that oneDNN is given, or would be where torch comes without it."""
    seen = []
    operator = getattr(torch.ops.mkldnn, "_linear_pointwise", lambda x, w, *more: x @ w.T)
    monkeypatch.setattr(matmul, "_prefers_onednn", lambda: True)

    def multiply(x, w, *more):
        seen.append(w)
        return operator(x, w, *more)

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", multiply, raising=False)
    return seen


def in_one_piece(w):
    return w.is_contiguous() or w.T.is_contiguous()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_oneDNN_is_given_factors_in_one_piece(factors, layout):
    """Others it multiplies by a plain loop: a step of Gemma 3 270M took half a minute."""
    w = LAYOUTS[layout](torch.randn(200, 200, generator=torch.Generator().manual_seed(0)))
    x = torch.randn(3, len(w), generator=torch.Generator().manual_seed(1))
    exact = x.double() @ w.double()
    for found in (matmul.times(x, w), matmul.times_transposed(x, w.T)):
        assert (found.double() - exact).norm() < 1e-6 * exact.norm()
    assert len(factors) == 2 and all(in_one_piece(w) for w in factors)


@pytest.mark.parametrize("in_out_layout", [False, True])
def test_blocks_of_dense_weights_are_given_in_one_piece(factors, monkeypatch, in_out_layout):
    """Some columns of them at a time: of a head in the backward pass, of Conv1D forwards."""
    monkeypatch.setattr(matmul, "_BLOCK", 1024)
    monkeypatch.setattr(matmul, "_FEW", 0)
    chance = torch.Generator().manual_seed(0)
    values, x = (torch.randn(shape, generator=chance) for shape in ((130, 320), (5, 320)))
    matrix = DenseMatrix(values, in_out_layout=in_out_layout)
    whole = (values.T if in_out_layout else values).double()
    x = x[:, : whole.shape[1]].clone().requires_grad_()
    y = frozen_product(x, matrix)
    y.sum().backward()
    exact, slope = x.double() @ whole.T, whole.sum(0).expand(5, -1)
    assert (y.double() - exact).norm() < 1e-6 * exact.norm()
    assert (x.grad.double() - slope).norm() < 1e-6 * slope.norm()
    assert len(factors) > 4 and all(in_one_piece(w) for w in factors)


def test_rows_are_padded_only_for_oneDNN(library):
    assert len(matmul.even_rows(torch.ones(33, 2, dtype=torch.float64))) == 33
    assert len(matmul.even_rows(torch.ones(33, 2, dtype=torch.bfloat16))) == 34
    assert len(matmul.even_rows(torch.ones(33, 2))) == (34 if matmul._prefers_onednn() else 33)
    assert not matmul.even_rows(torch.ones(33, 2, dtype=torch.bfloat16))[33].any()
