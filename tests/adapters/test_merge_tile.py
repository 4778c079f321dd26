"""The compiled merge of a tile and the one in numpy: the same bits, the same measures."""

import itertools
import math

import numpy
import pytest
import torch

from loraformat.nf4 import kernels
from loraformat.nf4.kernels.merge_tile import merge_tile, merge_tile_in_numpy
from loraformat.tensors.torch_arrays import array_of
from tests.adapters.merging import TYPES, gauss
from tests.adapters.test_interval_code import TYPES as DTYPES

SHAPES = [(5, 19), (3, 64), (7, 1), (1, 1023), (2, 1)]


def tile(shape, dtype):
    weight = (gauss(*shape, seed=1) * (4 * gauss(*shape, seed=2)).exp()).clamp(-6e4, 6e4)
    change = gauss(*shape, seed=3) * gauss(*shape, seed=4).exp() * weight.abs() * 2**-8
    weight[-1, -1] = 65519.0  # with what is added, beyond float16
    change[-1, -1] = 70.0
    change[0, 0] = 0.0
    return weight.to(dtype), change


@pytest.mark.parametrize("kernel", kernels.available())
@pytest.mark.parametrize(("source", "target"), itertools.product(TYPES.values(), repeat=2))
def test_every_kernel_gives_the_bits_of_the_formula(monkeypatch, kernel, source, target):
    monkeypatch.setenv(kernels.VARIABLE, kernel)
    for shape in SHAPES:
        weight, change = tile(shape, source)
        for gain in (None, gauss(shape[0], 1, seed=5).exp(), gauss(1, shape[1], seed=6).exp()):
            total = weight.float() + change
            total = total if gain is None else total * gain
            limit = 65504.0 if target == torch.float16 else math.inf
            wanted = total.clamp(-limit, limit).to(target)
            out = numpy.empty(shape, array_of(wanted).dtype)
            given = [None if t is None else array_of(t) for t in (weight, change, gain)]
            assert merge_tile(*given, out) is None
            assert out.tobytes() == array_of(wanted).tobytes()
            out[...] = 0
            sums = merge_tile(*given, out, measure=True)
            assert out.tobytes() == array_of(wanted).tobytes()
            same = merge_tile_in_numpy(*given, out, measure=True)
            assert sums[4:] == same[4:]
            assert sums == pytest.approx(same, rel=1e-4)


@pytest.mark.parametrize("kernel", kernels.available())
def test_measures_by_hand(monkeypatch, kernel):
    monkeypatch.setenv(kernels.VARIABLE, kernel)
    weight = numpy.array([[1.0, 2.0, 0.0, -4.0]], DTYPES["bf16"])
    change = numpy.array([[2.0**-10, 0.5, 0.0, 2.0**-7]], numpy.float32)
    out = numpy.empty_like(weight)
    sums = merge_tile(weight, change, None, out, measure=True)
    assert out.tolist() == [[1.0, 2.5, 0.0, -4.0]]
    lost = 2.0**-20 + 2.0**-14
    assert sums == (21.0, 0.25 + lost, 0.25, lost, 3, 2, 0)


@pytest.mark.parametrize("kernel", kernels.available())
def test_nan_and_infinity_stay(monkeypatch, kernel):
    monkeypatch.setenv(kernels.VARIABLE, kernel)
    weight = numpy.array([[math.nan, math.inf, -math.inf, 1.0]], numpy.float32)
    for dtype, largest in ((DTYPES["bf16"], math.inf), (DTYPES["f16"], 65504.0)):
        out = numpy.empty((1, 4), dtype)
        merge_tile(weight, None, None, out)
        assert math.isnan(out[0, 0])
        assert out[0, 1:].tolist() == [largest, -largest, 1.0]
