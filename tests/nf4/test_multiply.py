"""Multiplying a few vectors by rows while they are decoded: products of what `dequantize` gives."""

import pytest
import torch

from loraformat.errors import UsageError
from loraformat.nf4 import kernels
from tests import torch_codec as codec

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("block_size", [32, 64, 4096])
@pytest.mark.parametrize("vectors", [1, 2, 4, 9])
@pytest.mark.parametrize("shape", [(20, 256), (33, 130), (7, 30), (3, 9000), (5, 1)], ids=str)
def test_products(kernel, normal, shape, vectors, block_size, double_quant, dtype):
    rows, columns = shape
    before = 3 * columns // 2  # of another matrix, as in a stack of experts
    q = codec.quantize(
        normal(before + rows * columns), block_size=block_size, double_quant=double_quant
    )
    whole = codec.dequantize(q, dtype=dtype)[before:].view(shape)
    x = normal(vectors, columns)
    wide = torch.full((vectors, rows + 2), 7.0)
    out = wide[:, 1:-1]
    assert codec.multiply_rows(q, x, out, start=before, dtype=dtype) is out
    exact = x.double() @ whole.double().T
    size = x.double().abs() @ whole.double().abs().T
    assert ((out - exact).abs() <= 2e-7 * size * columns**0.5 + 1e-30).all()
    assert (wide[:, [0, -1]] == 7).all()


@pytest.mark.parametrize("columns", [64, 96, 4160, 77])
def test_compiled_kernels_have_the_same_bits(monkeypatch, normal, columns):
    q, x, found = codec.quantize(normal(40 * columns)), normal(5, columns), []
    for name in kernels.available()[1:]:
        monkeypatch.setenv(kernels.VARIABLE, name)
        found.append(codec.multiply_rows(q, x, torch.empty(5, 40), dtype=torch.bfloat16))
    assert len(found) > 0 and all(torch.equal(found[0], other) for other in found)


def test_nothing_to_multiply(kernel, normal):
    q = codec.quantize(normal(128))
    assert codec.multiply_rows(q, torch.empty(0, 64), torch.empty(0, 2)).shape == (0, 2)
    assert codec.multiply_rows(q, torch.ones(3, 64), torch.empty(3, 0)).shape == (3, 0)
    assert codec.multiply_rows(q, torch.empty(3, 0), torch.ones(3, 2)).tolist() == [[0, 0]] * 3


@pytest.mark.parametrize(
    "x, out, options, message",
    [
        (torch.ones(1, 64), torch.empty(1, 3), {}, "range"),
        (torch.ones(1, 64), torch.empty(1, 2), {"start": 1}, "range"),
        (torch.ones(1, 64), torch.empty(2, 2), {}, "vectors"),
        (torch.ones(64), torch.empty(1, 2), {}, "vectors"),
        (torch.ones(1, 64), torch.empty(2, 2).T[:1], {}, "vectors"),
        (torch.ones(2, 128)[:, ::2], torch.empty(2, 1), {}, "contiguous"),
        (torch.ones(1, 64).double(), torch.empty(1, 2), {}, "float64"),
        (torch.ones(1, 64), torch.empty(1, 2).bfloat16(), {}, "bfloat16"),
        (torch.ones(1, 64), torch.empty(1, 2), {"dtype": torch.float64}, "float64"),
    ],
)
def test_what_does_not_fit(normal, x, out, options, message):
    with pytest.raises(UsageError, match=message):
        codec.multiply_rows(codec.quantize(normal(128)), x, out, **options)
