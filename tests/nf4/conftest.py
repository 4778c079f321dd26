"""Every NF4 test runs on every kernel of this machine; the expected bits come from plain formulas.

The formulas below are written from the published rules, not from the package: ``bucketize`` on
midpoints instead of bins, no tiles, no packing tricks.
"""

from types import SimpleNamespace

import pytest
import torch

from loraformat.nf4 import kernels
from tests import torch_codec as codec

TINY = 1e-38


@pytest.fixture(params=kernels.available())
def kernel(request, monkeypatch):
    monkeypatch.setenv(kernels.VARIABLE, request.param)
    return request.param


def midpoints(values):
    return (values[:-1] + values[1:]) / 2


def normalize(x, block_size):
    """Blocks scaled to [-1, 1], and the maxima (the last one as it is, without a floor)."""
    whole = x.numel() - x.numel() % block_size
    largest = x[:whole].view(-1, block_size).abs().amax(1)
    inverse = 1.0 / largest.clamp(min=TINY)
    s = (x[:whole].view(-1, block_size) * inverse[:, None]).flatten()
    if whole < x.numel():
        tail = x[whole:].abs().amax(0, keepdim=True)
        s = torch.cat([s, x[whole:] / tail.clamp(min=TINY)])
        largest = torch.cat([largest, tail])
    return s, largest


def codes(x, block_size):
    """-> one 4-bit code per element, absmax with its floor in an incomplete last block."""
    s, absmax = normalize(x.flatten().float(), block_size)
    if x.numel() % block_size:
        absmax[-1].clamp_(min=TINY)
    return torch.bucketize(s, midpoints(codec.levels())), absmax


def pack(code):
    if code.numel() % 2:
        code = torch.cat([code, torch.tensor([7])])
    return (code[::2] * 16 + code[1::2]).to(torch.uint8)


def nested(absmax, offset):
    """-> 8-bit codes, nested absmax."""
    s, largest = normalize(absmax - torch.tensor(offset), 256)
    return torch.bucketize(s, midpoints(codec.nested_map())).to(torch.uint8), largest


def decode_scales(q):
    if q.nested_absmax is None:
        return q.absmax
    outer = q.nested_absmax.repeat_interleave(256)[: q.blocks]
    return codec.nested_map()[q.absmax.long()] * outer + torch.tensor(q.nested_offset)


def decode(q, dtype=torch.float32):
    code = torch.stack([q.packed >> 4, q.packed & 15], 1).flatten()[: q.count].long()
    scales = decode_scales(q).repeat_interleave(q.block_size)[: q.count]
    return (codec.levels()[code] * scales).to(dtype)


@pytest.fixture
def formula():
    return SimpleNamespace(
        codes=codes, pack=pack, nested=nested, decode_scales=decode_scales, decode=decode
    )


def bits(x):
    return x.contiguous().view({4: torch.int32, 2: torch.int16, 1: torch.uint8}[x.element_size()])


@pytest.fixture
def same():
    """Assert equality of bits: -0.0 is not 0.0 here."""

    def check(a, b):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert torch.equal(bits(a), bits(b))

    return check


@pytest.fixture
def normal():
    def make(*shape, dtype=torch.float32, seed=0):
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)

    return make
