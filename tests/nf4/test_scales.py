"""Double quantization: 8-bit codes of the scales, their absmax and offset."""

import math

import numpy as np
import pytest
import torch

from loraformat.tensors.torch_arrays import array_of
from tests import torch_codec as codec

COUNTS = (1, 64, 65, 64 * 255, 64 * 256, 64 * 257 + 3, 64 * 5000 + 17)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("block_size", [32, 64, 4096])
def test_formula(kernel, formula, same, normal, count, block_size):
    x = normal(count, seed=count)
    plain = codec.quantize(x, block_size=block_size, double_quant=False)
    q = codec.quantize(x, block_size=block_size)
    codes, nested_absmax = formula.nested(plain.absmax, q.nested_offset)
    same(q.packed, plain.packed)
    same(q.absmax, codes)
    same(q.nested_absmax, nested_absmax)
    same(q.scales(), formula.decode_scales(q))


@pytest.mark.parametrize("count", COUNTS)
def test_bitsandbytes_with_the_same_offset(kernel, same, normal, count):
    """Its C++ code for 8-bit codes is approximate (one in a thousand is one off); ours is exact."""
    import bitsandbytes.functional as bnb

    x = normal(count, seed=count + 1)
    absmax = codec.quantize(x, double_quant=False).absmax
    q = codec.quantize(x)
    peer, state = bnb.quantize_blockwise(absmax - torch.tensor(q.nested_offset), blocksize=256)
    same(q.nested_absmax, state.absmax)
    if q.blocks > 1:  # one block only: 0 / 0, for which it stores code 0
        off = (q.absmax.int() - peer.int()).abs()
        assert off.max() <= 1 and off.sum() <= max(1, q.blocks // 200)
    state.absmax = q.nested_absmax
    decoded = bnb.dequantize_blockwise(q.absmax, state) + torch.tensor(q.nested_offset)
    same(q.scales(), decoded)


@pytest.mark.parametrize("block_size", [64, 256])
def test_how_far_the_whole_is_from_bitsandbytes(kernel, same, normal, block_size):
    """What README claims: the same 4-bit codes; 8-bit ones differ by a step, and ours is nearer."""
    import bitsandbytes.functional as bnb

    x = normal(block_size * 40_000, seed=11)
    q = codec.quantize(x, block_size=block_size)
    peer, state = bnb.quantize_4bit(x, blocksize=block_size, compress_statistics=True,
                                    quant_type="nf4")  # fmt: skip
    same(q.packed, peer.flatten())
    assert abs(q.nested_offset - state.offset.item()) <= 4 * np.spacing(np.float32(q.nested_offset))
    off = (q.absmax.int() - state.absmax.int()).abs()
    assert 0 < (off > 0).double().mean() < 0.005
    exact = codec.quantize(x, block_size=block_size, double_quant=False).absmax.double()
    levels = codec.nested_map().double()
    wanted = (exact - q.nested_offset) / q.nested_absmax.double().repeat_interleave(256)[: len(off)]
    # Around zero the levels stand closer than the last bits of the two means.
    assert off[wanted.abs() > 1e-5].max() <= 1
    ours, theirs = (
        (levels[codes.long()] - wanted).abs()[off > 0] for codes in (q.absmax, state.absmax)
    )
    assert (ours <= theirs + 1e-6).all() and ours.mean() < theirs.mean()


@pytest.mark.parametrize("count", COUNTS)
def test_offset_is_the_exact_mean_rounded(kernel, normal, count):
    q = codec.quantize(normal(count))
    absmax = codec.quantize(normal(count), double_quant=False).absmax
    exact = math.fsum(absmax.tolist()) / absmax.numel()
    assert q.nested_offset == np.float32(q.nested_offset)
    assert q.nested_offset == np.float32(exact)
    ulp = np.spacing(np.float32(exact))
    assert abs(q.nested_offset - absmax.mean().item()) <= 4 * ulp


def test_offset_order_is_the_documented_one(kernel):
    """Scales of wildly different size, where the order of additions shows."""
    exponents = torch.arange(700) * 37 % 200 - 100
    x = torch.zeros(700, 64)
    x[:, 0] = torch.exp2(exponents.float()) * (1 + torch.arange(700) * 1e-4)
    sums = []
    for part in x[:, 0].double().split(256):
        part = torch.cat([part, torch.zeros(256 - part.numel(), dtype=torch.float64)])
        while part.numel() > 1:
            part = part[: part.numel() // 2] + part[part.numel() // 2 :]
        sums.append(part.item())
    assert codec.quantize(x).nested_offset == np.float32(math.fsum(sums) / 700)


def test_equal_scales(kernel):
    q = codec.quantize(torch.full((64 * 300,), -2.5))
    assert q.absmax.unique().tolist() == [127]
    assert q.nested_absmax.tolist() == [0, 0]
    assert q.nested_offset == 2.5
    assert q.scales().unique().tolist() == [2.5]


def test_on_and_beside_every_bound(kernel, formula, same):
    """Differences from the offset that land on the 255 midpoints: whole blocks and a tail."""
    bounds = (codec.nested_map()[:-1] + codec.nested_map()[1:]) / 2
    steps = torch.cat([bounds, torch.tensor([1.0])])
    below = steps.nextafter(torch.tensor(-2.0))
    for differences in (steps, below, torch.cat([steps, below, bounds[5:200]])):
        absmax = 4 + differences
        codes, nested = formula.nested(absmax, 4.0)
        from loraformat.nf4 import kernels

        got = torch.empty(absmax.numel(), dtype=torch.uint8), torch.empty_like(nested)
        kernels.active().quantize_scales(array_of(absmax), 4.0, *map(array_of, got))
        same(got[0], codes)
        same(got[1], nested)


def test_part_of_the_scales(kernel, same, normal):
    q = codec.quantize(normal(64 * 1000))
    whole = q.scales()
    for start, stop in ((0, 1000), (255, 257), (256, 512), (700, 701), (5, 5), (999, 1000)):
        same(q.scales(start, stop), whole[start:stop])
    assert codec.quantize(normal(640), double_quant=False).scales(2, 5).numel() == 3
