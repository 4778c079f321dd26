"""Casts between float16 and float32: numpy's bits, on every kernel."""

from __future__ import annotations

import numpy as np
import pytest

from loraformat.nf4 import kernels
from loraformat.nf4.kernels.cast import cast, widened

HALVES = np.arange(1 << 16, dtype=np.uint16).view(np.float16)


def floats():
    """Every half, what lies between and beside them, and random bits."""
    exact = HALVES[np.isfinite(HALVES)].astype(np.float32)
    between = (exact[:-1] + exact[1:]) / 2
    random = np.random.default_rng(0).integers(0, 1 << 32, 100_003, np.uint32).view(np.float32)
    sides = [np.nextafter(between, np.float32(side)) for side in (-np.inf, np.inf)]
    return np.concatenate([exact, between, *sides, random, np.float32([np.inf, -np.inf, 65520])])


@pytest.mark.parametrize("kernel", kernels.available())
def test_the_bits_are_those_of_numpy(kernel):
    values = floats()
    for source, dtype in ((HALVES, np.float32), (values, np.float16)):
        found = np.empty(source.shape, dtype)
        cast(source, found, kernel=kernel)
        with np.errstate(all="ignore"):
            wanted = source.astype(dtype)
        number = ~np.isnan(wanted)
        assert np.array_equal(np.isnan(found), ~number)
        bits = f"u{found.itemsize}"
        assert np.array_equal(found.view(bits)[number], wanted.view(bits)[number])


def test_arrays_that_are_not_contiguous_are_cast_all_the_same():
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    out = np.zeros((4, 3), np.float16)
    cast(values.T, out)
    assert np.array_equal(out, values.T)
    assert np.array_equal(widened(out.T), values)
