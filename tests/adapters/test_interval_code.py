"""The interval-rank code: exact for every dtype, size of delta and special value, and small."""

import itertools

import ml_dtypes
import numpy
import pytest

from loraformat.nf4.kernels.merge_tile import merged_values
from loraformat.tensors.arrays import numpy_dtype
from loraformat.undo.interval_code import Unmergeable, decode_tile, encode_tile

TYPES = {"f32": numpy_dtype("F32"), "f16": numpy_dtype("F16"), "bf16": numpy_dtype("BF16")}


def normal(*shape, seed=0):
    return numpy.random.default_rng(seed).standard_normal(shape, numpy.float32)


def round_trip(weight, delta, gain, target):
    merged = merged_values(weight, delta, gain, target)
    bits, zeros = encode_tile(weight, delta, gain, merged)
    back = decode_tile(merged, delta, gain, weight.dtype, bits)
    back.reshape(-1)[zeros] = -0.0
    with pytest.raises(Unmergeable):
        decode_tile(merged, delta, gain, weight.dtype, bits + b"rest")
    assert back.dtype == weight.dtype
    assert back.tobytes() == weight.tobytes()
    return 8 * len(bits) / weight.size


@pytest.mark.parametrize("size", [0.0, 1e-3, 1e-2, 1e-1, 3.0])
@pytest.mark.parametrize(("source", "target"), itertools.product(TYPES, TYPES))
def test_exact(source, target, size):
    weight = (0.02 * normal(40, 50)).astype(TYPES[source])
    weight[0, :4] = [0.0, -0.0, 1e-7, -1e-7]
    delta = 0.02 * size * normal(40, 50, seed=1)
    delta[1, :3] = [0.0, -0.0, 1e4]
    round_trip(weight, delta, None, TYPES[target])
    gain = normal(40, 1, seed=2) * 2
    gain[0] = 0
    round_trip(weight, delta, gain, TYPES[target])


@pytest.mark.parametrize("dtype", TYPES.values(), ids=TYPES)
def test_every_corner(dtype):
    info = ml_dtypes.finfo(dtype)
    tiny, subnormal = (float(x) for x in (info.tiny, info.smallest_subnormal))
    corners = [0.0, -0.0, tiny, -tiny, tiny / 2, subnormal, float(info.max), float(info.min), 1.0]
    weight = numpy.array(corners * len(corners)).astype(dtype)
    delta = numpy.repeat(numpy.array(corners).astype(numpy.float32), len(corners))
    keep = numpy.isfinite(merged_values(weight, delta, None, TYPES["f32"]))
    round_trip(weight[keep], delta[keep], None, TYPES["f16"])
    round_trip(weight[keep], delta[keep], None, TYPES["f32"])


@pytest.mark.parametrize(("size", "most"), [(1e-3, 0.008), (1e-2, 0.045), (1e-1, 0.25)])
def test_a_few_hundredths_of_a_bit(size, most):
    weight = (0.02 * normal(400, 500)).astype(TYPES["bf16"])
    delta = 0.02 * size * normal(400, 500, seed=1)
    assert 0 < round_trip(weight, delta, None, TYPES["bf16"]) < most


def test_what_intervals_cannot_describe():
    weight = numpy.array([1.0, numpy.nan], numpy.float32)
    delta = numpy.zeros_like(weight)
    with pytest.raises(Unmergeable):
        encode_tile(weight, delta, None, merged_values(weight, delta, None, TYPES["bf16"]))
    weight = numpy.array([3e38], numpy.float32)
    with pytest.raises(Unmergeable):
        encode_tile(weight, weight, None, merged_values(weight, weight, None, TYPES["f32"]))
    merged, delta = numpy.zeros(9, numpy.float32), numpy.full(9, 1 / 3, numpy.float32)
    with pytest.raises(Unmergeable):
        decode_tile(merged, delta, None, TYPES["bf16"], b"")


def test_wide_ranks_are_packed_in_order():
    weight, delta = normal(3000), normal(3000, seed=1)
    assert 14 < round_trip(weight, delta, None, TYPES["bf16"]) < 18
