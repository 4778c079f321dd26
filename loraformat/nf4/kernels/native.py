"""ctypes bindings of the C kernels."""

from __future__ import annotations

import ctypes
import warnings
from ctypes import c_float, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy

from loraformat.nf4.kernels.tables import tables
from loraformat.tensors.arrays import Array, numpy_dtype

if TYPE_CHECKING:
    from loraformat.nf4.quantized import NF4

__all__ = ["DTYPES", "ISAS", "NativeKernel", "address", "library", "supported"]

# Order of the enumeration in nf4.h.
ISAS = ("scalar", "avx2", "avx512", "neon")
#: The types of numbers, as nf4.h numbers them.
DTYPES = {numpy_dtype(name): number for number, name in enumerate(("F32", "F16", "BF16"))}

_INTERFACE = 3
_DOT_TOKENS = 4  # NF4_DOT_TOKENS
_NAMES = ("_nf4.so", "_nf4.dylib", "_nf4.dll")
#: The exported functions, with the types of their arguments and of what they return.
_FUNCTIONS = {
    "nf4_quantize": "piipnnpp i",
    "nf4_dequantize": "piippnnnpi",
    "nf4_dequantize_rows": "piipppfnnnnnp",
    "nf4_multiply_rows": "piipppfnnnnpnpn",
    "nf4_error": "piipppnnnpp",
    "nf4_sum_scales": "pnp",
    "nf4_quantize_scales": "ppfnpp",
    "nf4_decode_scales": "pppfnnp",
    "cast_half_to_float": "ippn",
    "cast_float_to_half": "ippn",
    "merge_tile": "iiip",
    "interval_encode": "iiip i",
    "interval_decode": "iiip i",
}
_TYPES: dict[str, Any] = {"p": c_void_p, "i": c_int, "n": c_int64, "f": c_float}


@cache
def library() -> ctypes.CDLL | None:
    """Load the shared library beside this file; None if it was not built.

    None, with a warning, also if it cannot be loaded or belongs to another version, as that of a
    checkout does that was updated and not installed again.
    """
    for name in _NAMES:
        path = Path(__file__).with_name(name)
        if not path.is_file():
            continue
        try:
            loaded = ctypes.CDLL(str(path))
            if loaded.nf4_interface() == _INTERFACE:
                for function, types in _FUNCTIONS.items():
                    arguments, _, result = types.partition(" ")
                    getattr(loaded, function).argtypes = [_TYPES[one] for one in arguments]
                    getattr(loaded, function).restype = _TYPES.get(result)
                return loaded
            problem = "belongs to another version"
        except (OSError, AttributeError) as error:
            problem = f"cannot be used ({error})"
        warnings.warn(
            f"{name} {problem}: numpy is used instead, which is many times slower; reinstall "
            "loraformat to build it",
            RuntimeWarning,
            stacklevel=2,
        )
    return None


def supported() -> tuple[str, ...]:
    """List the instruction sets that the library has and this CPU can run, slowest first."""
    lib = library()
    if lib is None:
        return ()
    return tuple(name for number, name in enumerate(ISAS) if lib.nf4_supported(number))


class NativeKernel:
    """The `loraformat.nf4.kernels.Kernel` methods on one instruction set of the C library.

    Parameters
    ----------
    isa : str
        One of `supported`.
    """

    def __init__(self, isa: str) -> None:
        lib = library()
        assert lib is not None and isa in supported()
        self.name, self._lib = isa, lib
        self._owned = tables()  # its address alone would not keep it
        self._tables = address(self._owned)
        self._head = self._tables, ISAS.index(isa)

    def quantize(self, x: Array, block_size: int, packed: Array, absmax: Array) -> bool:
        """See `Kernel.quantize`."""
        dtype, sizes = DTYPES[x.dtype], (x.size, block_size)
        to = address(packed), address(absmax)
        return bool(self._lib.nf4_quantize(*self._head, dtype, address(x), *sizes, *to))

    def sum_scales(self, absmax: Array, sums: Array) -> None:
        """See `Kernel.sum_scales`."""
        self._lib.nf4_sum_scales(address(absmax), absmax.size, address(sums))

    def quantize_scales(
        self, absmax: Array, offset: float, codes: Array, nested_absmax: Array
    ) -> None:
        """See `Kernel.quantize_scales`."""
        to = address(codes), address(nested_absmax)
        self._lib.nf4_quantize_scales(self._tables, address(absmax), offset, absmax.size, *to)

    def decode_scales(
        self, codes: Array, nested_absmax: Array, offset: float, start: int, out: Array
    ) -> None:
        """See `Kernel.decode_scales`."""
        stored, blocks = (address(codes), address(nested_absmax)), (start, start + out.size)
        self._lib.nf4_decode_scales(self._tables, *stored, offset, *blocks, address(out))

    def dequantize(
        self, packed: Array, scales: Array, block_size: int, start: int, out: Array, streaming: bool
    ) -> None:
        """See `Kernel.dequantize`."""
        stored, elements = (address(packed), address(scales)), (start, start + out.size)
        self._lib.nf4_dequantize(
            *self._head, DTYPES[out.dtype], *stored, block_size, *elements, address(out), streaming
        )

    def dequantize_rows(self, q: NF4, start: int, stride: int, out: Array) -> None:
        """See `Kernel.dequantize_rows`."""
        head = *self._head, DTYPES[out.dtype], *_stored(q)
        self._lib.nf4_dequantize_rows(*head, start, stride, *out.shape, address(out))

    def multiply_rows(
        self, q: NF4, start: int, dtype: numpy.dtype[Any], x: Array, out: Array
    ) -> None:
        """See `Kernel.multiply_rows`."""
        head = *self._head, DTYPES[dtype], *_stored(q), start, out.shape[1], x.shape[1]
        for first in range(0, len(x), _DOT_TOKENS):
            self._lib.nf4_multiply_rows(
                *head,
                address(x) + first * x.strides[0],
                min(_DOT_TOKENS, len(x) - first),
                address(out) + first * out.strides[0],
                out.strides[0] // out.itemsize,
            )

    def error(self, x: Array, packed: Array, scales: Array, block_size: int, sums: Array) -> None:
        """See `Kernel.error`."""
        head = *self._head, DTYPES[x.dtype], address(x), address(packed), address(scales)
        to = address(sums), address(sums) + sums.strides[0]
        self._lib.nf4_error(*head, block_size, 0, x.size, *to)


def address(array: Array) -> int:
    """Return where an array's first element is in memory."""
    where: int = array.__array_interface__["data"][0]
    return where


def _stored(q: NF4) -> tuple[int, int, int | None, float, int]:
    """Return a quantized tensor as the C functions of rows take it."""
    return *q.addresses, q.nested_offset or 0.0, q.block_size
