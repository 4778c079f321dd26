"""Every kernel of the interval code gives the bits of the torch one, or refuses as it does."""

import itertools
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraformat.nf4 import kernels
from loraformat.nf4.kernels import interval_native
from loraformat.undo.fixed_point import merge_values
from loraformat.undo.interval_code import Unmergeable, decode_tile, encode_tile

TYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
INTEGERS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}
COMPILED = [name for name in kernels.available() if name != "torch"]


def with_kernel(name, work, *args):
    before = os.environ.get(kernels.VARIABLE)
    os.environ[kernels.VARIABLE] = name
    try:
        return work(*args)
    except Unmergeable:
        return None
    finally:
        os.environ.pop(kernels.VARIABLE)
        if before is not None:
            os.environ[kernels.VARIABLE] = before


def bits_of(tensor):
    return tensor.contiguous().view(INTEGERS[tensor.dtype])


def agree(weight, delta, gain, target, damage=True):
    """Encode and decode with all kernels; return the bits, or None if it cannot be done."""
    merged = merge_values(weight, delta, gain, target)
    wanted = with_kernel("torch", encode_tile, weight, delta, gain, merged)
    for name in COMPILED:
        found = with_kernel(name, encode_tile, weight, delta, gain, merged)
        assert (found is None) == (wanted is None), name
        if found is not None and wanted is not None:
            assert found[0] == wanted[0], name
            assert torch.equal(found[1], wanted[1]), name
    if wanted is None:
        return None
    for name in ("torch", *COMPILED):
        args = (merged, delta, gain, weight.dtype)
        back = with_kernel(name, decode_tile, *args, wanted[0])
        assert back is not None, name
        back.view(-1)[wanted[1]] = -0.0
        assert torch.equal(bits_of(back), bits_of(weight)), name
        for damaged in (wanted[0] + b"\0", wanted[0][:-1], wanted[0][:-1] + b"\xff") * damage:
            other = with_kernel(name, decode_tile, *args, damaged)
            expected = with_kernel("torch", decode_tile, *args, damaged)
            assert (other is None) == (expected is None), name
            assert expected is None or torch.equal(bits_of(other), bits_of(expected)), name
    return wanted[0]


def test_there_is_something_to_compare():
    assert COMPILED == [] or interval_native.loaded()
    assert "scalar" in COMPILED  # the development installation compiles


def test_the_environment_chooses(monkeypatch):
    monkeypatch.setenv(kernels.VARIABLE, "torch")
    assert not interval_native.loaded()
    monkeypatch.setenv(kernels.VARIABLE, "scalar")
    assert interval_native.loaded()


DELTAS = [0.0, -0.0, 1e-3, -0.37, 700.0, -6e4, 3e38, 1e-45, -6e-8]


@pytest.mark.parametrize(("source", "target"), itertools.product(["bf16", "f16"], TYPES))
def test_every_value_of_sixteen_bits(source, target):
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(TYPES[source])
    finite = every[torch.isfinite(every)]
    generator = torch.Generator().manual_seed(0)
    spread = finite.float() * 0.1 * torch.randn(len(finite), generator=generator)
    for delta in [*map(torch.tensor, DELTAS), spread]:
        near = torch.isfinite(merge_values(finite, delta, None, TYPES[target]))
        assert near.sum() > 60000 or float(delta) > 1e38
        each = delta if delta.dim() == 0 else delta[near]
        assert agree(finite[near], each, None, TYPES[target], damage=False) is not None
    assert agree(every, torch.tensor(0.5), None, TYPES[target]) is None  # NaN and infinity


def floats(dtype):
    """Every pattern of bits, but often ordinary numbers."""
    width = 32 if dtype == "f32" else 16
    low, high = -(2 ** (width - 1)), 2 ** (width - 1) - 1
    ordinary = st.floats(-2, 2, width=32).map(lambda x: torch.tensor(x).to(TYPES[dtype]))
    pattern = st.integers(low, high).map(
        lambda i: torch.tensor(i, dtype=INTEGERS[TYPES[dtype]]).view(TYPES[dtype])
    )
    return ordinary | pattern


@st.composite
def tiles(draw):
    source, target = draw(st.sampled_from(list(TYPES))), draw(st.sampled_from(list(TYPES)))
    rows, columns = draw(st.integers(1, 3)), draw(st.integers(1, 37))
    count = rows * columns

    def some(dtype, number):
        return torch.stack(draw(st.lists(floats(dtype), min_size=number, max_size=number)))

    weight = some(source, count).view(rows, columns)
    if draw(st.booleans()):
        weight = torch.where(torch.isfinite(weight), weight, 1)
    shape = draw(st.sampled_from([(rows, columns), (1, columns), ()]))
    delta = some("f32", max(1, torch.Size(shape).numel())).view(shape)
    gain = None
    if draw(st.booleans()):
        along = draw(st.sampled_from([(rows, 1), (1, columns)]))
        gain = some("f32", torch.Size(along).numel()).view(along)
    return weight, delta, gain, TYPES[target]


@given(tiles())
@settings(max_examples=80, deadline=None, derandomize=True)
def test_any_tile(tile):
    weight, delta, gain, target = tile
    agree(weight, delta.nan_to_num(0.5), None if gain is None else gain.nan_to_num(2.0), target)
    agree(weight, delta, gain, target)


@pytest.mark.parametrize("columns", [1, 7, 8, 33])
@pytest.mark.parametrize(("source", "target"), itertools.product(TYPES, TYPES))
def test_gains_along_either_side(source, target, columns):
    generator = torch.Generator().manual_seed(columns)
    weight = torch.randn(50, columns, generator=generator).to(TYPES[source])
    delta = torch.randn(50, columns, generator=generator)
    for shape in ((50, 1), (1, columns)):
        gain = torch.randn(shape, generator=generator)
        gain[0, 0] = 0
        assert agree(weight, delta, gain, TYPES[target]) is not None


def test_bytes_at_any_address():
    weight = torch.randn(1000).bfloat16()
    delta = torch.randn(1000) * 0.1
    merged = merge_values(weight, delta, None, torch.float16)
    whole = torch.empty(2001, dtype=torch.uint8)
    whole[1:] = merged.view(torch.uint8)
    odd = torch.frombuffer(whole.numpy().data, dtype=torch.float16, offset=1, count=1000)
    bits, _ = encode_tile(weight, delta, None, odd)
    assert torch.equal(decode_tile(odd, delta, None, torch.bfloat16, bits), weight)
