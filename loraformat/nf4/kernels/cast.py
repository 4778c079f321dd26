"""Casts between float16 and float32: numpy's own take twenty times as long as copies."""

from __future__ import annotations

from collections.abc import Callable
from ctypes import c_int, c_int64, c_void_p
from functools import cache

import numpy

from loraformat.nf4.kernels import active
from loraformat.nf4.kernels.native import ISAS, address, library
from loraformat.tensors.arrays import Array

__all__ = ["cast", "widened"]

_INTERFACE = 1
_FUNCTIONS = {
    (numpy.dtype("<f2"), numpy.dtype("<f4")): "cast_half_to_float",
    (numpy.dtype("<f4"), numpy.dtype("<f2")): "cast_float_to_half",
}


def cast(values: Array, out: Array, *, kernel: str | None = None) -> None:
    """Copy numbers into an array of another dtype, each rounded once, to nearest even.

    Parameters
    ----------
    values, out : numpy.ndarray
        Of one shape. Casts between float16 and float32, both contiguous, are made in C where
        the library is there; the bits are those of numpy, but for the payload of a NaN. What
        is too large becomes infinite.
    kernel : str, optional
        One of `loraformat.nf4.kernels.available`; the active one by default.

    Examples
    --------
    >>> out = numpy.empty(2, numpy.float16)
    >>> cast(numpy.array([1e6, 1 / 3], numpy.float32), out)
    >>> out
    array([   inf, 0.3333], dtype=float16)
    """
    name = _FUNCTIONS.get((values.dtype, out.dtype))
    function = _functions().get(name or "")
    isa = kernel or active().name
    plain = values.flags.c_contiguous and out.flags.c_contiguous
    if function is None or not plain or isa not in ISAS:
        with numpy.errstate(all="ignore"):
            out[...] = values
    else:
        assert values.shape == out.shape
        function(ISAS.index(isa), address(values), address(out), values.size)


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


@cache
def _functions() -> dict[str, Callable[..., None]]:
    """Return the C functions by name; none without a library, or of one that lacks them."""
    loaded = library()
    interface = getattr(loaded, "cast_interface", None)
    if loaded is None or interface is None or interface() != _INTERFACE:
        return {}
    functions: dict[str, Callable[..., None]] = {}
    for name in _FUNCTIONS.values():
        function = getattr(loaded, name)
        function.argtypes = [c_int, c_void_p, c_void_p, c_int64]
        function.restype = None
        functions[name] = function
    return functions
