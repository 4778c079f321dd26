"""Every kernel of the interval code gives the bits of the numpy one, or refuses as it does."""

import itertools
import os
from math import prod

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraformat.nf4 import kernels
from loraformat.nf4.kernels import interval_native, native
from loraformat.nf4.kernels.merge_tile import merged_values
from loraformat.undo.interval_code import Unmergeable, decode_tile, encode_tile
from tests.adapters.test_interval_code import TYPES, normal

COMPILED = [name for name in kernels.available() if name in native.ISAS]
(PLAIN,) = set(kernels.available()) - set(COMPILED)


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


def agree(weight, delta, gain, target, damage=True):
    """Encode and decode with all kernels; return the bits, or None if it cannot be done."""
    merged = merged_values(weight, delta, gain, target)
    wanted = with_kernel(PLAIN, encode_tile, weight, delta, gain, merged)
    for name in COMPILED:
        found = with_kernel(name, encode_tile, weight, delta, gain, merged)
        assert (found is None) == (wanted is None), name
        if found is not None and wanted is not None:
            assert found[0] == wanted[0], name
            assert numpy.array_equal(found[1], wanted[1]), name
    if wanted is None:
        return None
    for name in (PLAIN, *COMPILED):
        args = (merged, delta, gain, weight.dtype)
        back = with_kernel(name, decode_tile, *args, wanted[0])
        assert back is not None, name
        back.reshape(-1)[wanted[1]] = -0.0
        assert back.tobytes() == weight.tobytes(), name
        for damaged in (wanted[0] + b"\0", wanted[0][:-1], wanted[0][:-1] + b"\xff") * damage:
            other = with_kernel(name, decode_tile, *args, damaged)
            expected = with_kernel(PLAIN, decode_tile, *args, damaged)
            assert (other is None) == (expected is None), name
            assert expected is None or other.tobytes() == expected.tobytes(), name
    return wanted[0]


def test_there_is_something_to_compare():
    assert COMPILED == [] or interval_native.loaded()
    assert "scalar" in COMPILED  # the development installation compiles


def test_the_environment_chooses(monkeypatch):
    monkeypatch.setenv(kernels.VARIABLE, PLAIN)
    assert not interval_native.loaded()
    monkeypatch.setenv(kernels.VARIABLE, "scalar")
    assert interval_native.loaded()


DELTAS = [0.0, -0.0, 1e-3, -0.37, 700.0, -6e4, 3e38, 1e-45, -6e-8]


@pytest.mark.parametrize(("source", "target"), itertools.product(["bf16", "f16"], TYPES))
def test_every_value_of_sixteen_bits(source, target):
    every = numpy.arange(65536).astype(numpy.uint16).view(TYPES[source])
    finite = every[numpy.isfinite(every)]
    spread = finite.astype(numpy.float32) * 0.1 * normal(len(finite))
    for delta in [*(numpy.array(value, numpy.float32) for value in DELTAS), spread]:
        near = numpy.isfinite(merged_values(finite, delta, None, TYPES[target]))
        assert near.sum() > 60000 or float(delta) > 1e38
        each = delta if delta.ndim == 0 else delta[near]
        assert agree(finite[near], each, None, TYPES[target], damage=False) is not None
    half = numpy.array(0.5, numpy.float32)
    assert agree(every, half, None, TYPES[target]) is None  # NaN and infinity


def floats(dtype):
    """Every pattern of bits, but often ordinary numbers."""
    bits = numpy.dtype(f"u{TYPES[dtype].itemsize}")
    ordinary = st.floats(-2, 2, width=32).map(lambda x: numpy.array(x).astype(TYPES[dtype]))
    pattern = st.integers(0, numpy.iinfo(bits).max).map(
        lambda i: numpy.array(i, bits).view(TYPES[dtype])
    )
    return ordinary | pattern


@st.composite
def tiles(draw):
    source, target = draw(st.sampled_from(list(TYPES))), draw(st.sampled_from(list(TYPES)))
    rows, columns = draw(st.integers(1, 3)), draw(st.integers(1, 37))
    count = rows * columns

    def some(dtype, number):
        return numpy.stack(draw(st.lists(floats(dtype), min_size=number, max_size=number)))

    weight = some(source, count).reshape(rows, columns)
    if draw(st.booleans()):
        weight[~numpy.isfinite(weight)] = 1
    shape = draw(st.sampled_from([(rows, columns), (1, columns), ()]))
    delta = some("f32", prod(shape)).reshape(shape)
    gain = None
    if draw(st.booleans()):
        along = draw(st.sampled_from([(rows, 1), (1, columns)]))
        gain = some("f32", prod(along)).reshape(along)
    return weight, delta, gain, TYPES[target]


@given(tiles())
@settings(max_examples=80, deadline=None, derandomize=True)
def test_any_tile(tile):
    weight, delta, gain, target = tile
    known = None if gain is None else numpy.nan_to_num(gain, nan=2.0)
    agree(weight, numpy.nan_to_num(delta, nan=0.5), known, target)
    agree(weight, delta, gain, target)


@pytest.mark.parametrize("columns", [1, 7, 8, 33])
@pytest.mark.parametrize(("source", "target"), itertools.product(TYPES, TYPES))
def test_gains_along_either_side(source, target, columns):
    weight = normal(50, columns, seed=columns).astype(TYPES[source])
    delta = normal(50, columns, seed=columns + 1)
    for shape in ((50, 1), (1, columns)):
        gain = normal(*shape, seed=columns + 2)
        gain[0, 0] = 0
        assert agree(weight, delta, gain, TYPES[target]) is not None


def test_bytes_at_any_address():
    weight, delta = normal(1000).astype(TYPES["bf16"]), normal(1000, seed=1) / 10
    merged = merged_values(weight, delta, None, TYPES["f16"])
    whole = numpy.empty(2001, numpy.uint8)
    whole[1:] = merged.view(numpy.uint8)
    odd = numpy.frombuffer(whole.data, TYPES["f16"], offset=1, count=1000)
    bits, _ = encode_tile(weight, delta, None, odd)
    back = decode_tile(odd, delta, None, TYPES["bf16"], bits)
    assert back.tobytes() == weight.tobytes()
