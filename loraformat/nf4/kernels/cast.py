"""Casts between float16 and float32: numpy's own take twenty times as long as copies."""

from __future__ import annotations

import numpy

from loraformat.nf4.kernels import active
from loraformat.nf4.kernels.native import ISAS, address, library
from loraformat.tensors.arrays import Array

__all__ = ["cast", "widened"]

_FUNCTIONS = {
    (numpy.dtype("<f2"), numpy.dtype("<f4")): "cast_half_to_float",
    (numpy.dtype("<f4"), numpy.dtype("<f2")): "cast_float_to_half",
}


def cast(values: Array, out: Array, *, kernel: str | None = None) -> None:
    """Copy numbers into an array of another dtype, each rounded once, to nearest even.

    Casts between float16 and float32, both contiguous, are made in C where the library is there;
    the bits are those of numpy, but for the payload of a NaN. What is too large becomes infinite.
    `kernel` is one of `loraformat.nf4.kernels.available`; the active one by default.

    Examples
    --------
    >>> out = numpy.empty(2, numpy.float16)
    >>> cast(numpy.array([1e6, 1 / 3], numpy.float32), out)
    >>> out
    array([   inf, 0.3333], dtype=float16)
    """
    name = _FUNCTIONS.get((values.dtype, out.dtype))
    isa = kernel or active().name
    plain = values.flags.c_contiguous and out.flags.c_contiguous
    if name is None or not plain or isa not in ISAS:
        with numpy.errstate(all="ignore"):
            out[...] = values
    else:
        assert values.shape == out.shape
        getattr(library(), name)(ISAS.index(isa), address(values), address(out), values.size)


def widened(array: Array) -> Array:
    """Return numbers of any plain dtype as float32; those of float32 as they are.

    Examples
    --------
    >>> widened(numpy.float16([1, 2]))
    array([1., 2.], dtype=float32)
    """
    if array.dtype == numpy.float32:
        return array
    out = numpy.empty(array.shape, numpy.float32)
    cast(array, out)
    return out
