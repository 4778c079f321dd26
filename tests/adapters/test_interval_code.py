"""The interval-rank code: exact for every dtype, size of delta and special value, and small."""

import itertools

import pytest
import torch

from loraformat.undo.fixed_point import merge_values
from loraformat.undo.interval_code import Unmergeable, decode_tile, encode_tile

TYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def round_trip(weight, delta, gain, target):
    merged = merge_values(weight, delta, gain, target)
    bits, zeros = encode_tile(weight, delta, gain, merged)
    back = decode_tile(merged, delta, gain, weight.dtype, bits)
    back.view(-1)[zeros] = -0.0
    with pytest.raises(Unmergeable):
        decode_tile(merged, delta, gain, weight.dtype, bits + b"rest")
    integers = torch.int32 if weight.dtype == torch.float32 else torch.int16
    assert torch.equal(back.view(integers), weight.contiguous().view(integers))
    return 8 * len(bits) / weight.numel()


@pytest.mark.parametrize("size", [0.0, 1e-3, 1e-2, 1e-1, 3.0])
@pytest.mark.parametrize(("source", "target"), itertools.product(TYPES, TYPES))
def test_exact(source, target, size):
    generator = torch.Generator().manual_seed(0)
    weight = (0.02 * torch.randn(40, 50, generator=generator)).to(TYPES[source])
    weight[0, :4] = torch.tensor([0.0, -0.0, 1e-7, -1e-7])
    delta = 0.02 * size * torch.randn(40, 50, generator=generator)
    delta[1, :3] = torch.tensor([0.0, -0.0, 1e4])
    round_trip(weight, delta, None, TYPES[target])
    gain = torch.randn(40, 1, generator=generator) * 2
    gain[0] = 0
    round_trip(weight, delta, gain, TYPES[target])


@pytest.mark.parametrize("dtype", TYPES.values(), ids=TYPES)
def test_every_corner(dtype):
    info = torch.finfo(dtype)
    corners = [0.0, -0.0, info.tiny, -info.tiny, info.smallest_normal / 2, info.max, info.min, 1.0]
    weight = torch.tensor(corners * len(corners), dtype=dtype)
    delta = torch.tensor(corners, dtype=dtype).float().repeat_interleave(len(corners))
    keep = torch.isfinite(merge_values(weight, delta, None, torch.float32))
    round_trip(weight[keep], delta[keep], None, torch.float16)
    round_trip(weight[keep], delta[keep], None, torch.float32)


@pytest.mark.parametrize(("size", "most"), [(1e-3, 0.008), (1e-2, 0.045), (1e-1, 0.25)])
def test_a_few_hundredths_of_a_bit(size, most):
    generator = torch.Generator().manual_seed(0)
    weight = (0.02 * torch.randn(400, 500, generator=generator)).bfloat16()
    delta = 0.02 * size * torch.randn(400, 500, generator=generator)
    assert 0 < round_trip(weight, delta, None, torch.bfloat16) < most


def test_what_intervals_cannot_describe():
    weight = torch.tensor([1.0, float("nan")])
    delta = torch.zeros(2)
    with pytest.raises(Unmergeable):
        encode_tile(weight, delta, None, merge_values(weight, delta, None, torch.bfloat16))
    weight = torch.tensor([3e38])
    with pytest.raises(Unmergeable):
        encode_tile(weight, weight, None, merge_values(weight, weight, None, torch.float32))
    with pytest.raises(Unmergeable):
        decode_tile(torch.zeros(9), torch.full((9,), 1 / 3), None, torch.bfloat16, b"")


def test_wide_ranks_are_packed_in_order():
    weight = torch.randn(3000)
    delta = torch.randn(3000)
    assert 14 < round_trip(weight, delta, None, torch.bfloat16) < 18
