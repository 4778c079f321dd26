"""The error of quantization: right, and the same on every kernel and thread count."""

import math

import pytest
import torch

from loraformat.errors import UsageError
from loraformat.nf4 import kernels
from tests import torch_codec as codec


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 15, 4096, 4097, 100_003, 600_000])
def test_against_float64(kernel, formula, normal, dtype, count):
    x = normal(count, dtype=dtype)
    q = codec.quantize(x)
    error, square = codec.quantization_error(x, q)
    difference = x.double() - formula.decode(q).double()
    assert math.isclose(error, difference.square().sum().item(), rel_tol=1e-6)
    assert math.isclose(square, x.double().square().sum().item(), rel_tol=1e-12)


@pytest.mark.parametrize("block_size", [32, 64, 4096])
def test_every_kernel_and_thread_count_gives_the_same_bits(monkeypatch, normal, block_size):
    x = normal(1_000_007) * torch.exp2(torch.linspace(-30, 30, 1_000_007))
    q = codec.quantize(x, block_size=block_size)
    results = set()
    for choice in kernels.available():
        monkeypatch.setenv(kernels.VARIABLE, choice)
        results |= {codec.quantization_error(x, q, threads=threads) for threads in (1, 4)}
    assert len(results) == 1


def test_known_size(kernel, normal):
    """Normal numbers lose 9 % at block 64 (Dettmers 2023 chose the levels for them)."""
    x = normal(512, 512)
    for double_quant in (False, True):
        error, square = codec.quantization_error(x, codec.quantize(x, double_quant=double_quant))
        assert 0.088 < math.sqrt(error / square) < 0.094


def test_levels_themselves_lose_nothing(kernel):
    x = codec.levels().repeat(40)
    q = codec.quantize(x, double_quant=False)
    error, square = codec.quantization_error(x, q)
    assert error == 0
    assert math.isclose(square, x.double().square().sum().item(), rel_tol=1e-12)


def test_huge_and_tiny_do_not_overflow_or_vanish(kernel):
    for size in (1e-30, 1e38):
        x = torch.linspace(-size, size, 1000)
        error, square = codec.quantization_error(x, codec.quantize(x))
        assert 0 < error < square < math.inf


def test_shape_is_checked(kernel, normal):
    with pytest.raises(UsageError):
        codec.quantization_error(normal(65), codec.quantize(normal(64)))
    with pytest.raises(UsageError):
        codec.quantization_error(normal(64).double(), codec.quantize(normal(64)))
