"""ctypes bindings of the C kernels."""

from __future__ import annotations

import ctypes
import warnings
from ctypes import c_float, c_int, c_int32, c_int64, c_uint8, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import numpy

from loraformat.nf4.kernels.codes import Codes
from loraformat.nf4.kernels.tables import tables
from loraformat.tensors.arrays import Array, numpy_dtype

__all__ = ["ISAS", "NativeKernel", "Tables", "address", "c_tables", "library", "supported"]

# Order of the enumeration in nf4.h.
ISAS = ("scalar", "avx2", "avx512", "neon")

_INTERFACE = 3
_DOT_TOKENS = 4  # NF4_DOT_TOKENS
_NAMES = ("_nf4.so", "_nf4.dylib", "_nf4.dll")
_DTYPES = {numpy_dtype("F32"): 0, numpy_dtype("F16"): 1, numpy_dtype("BF16"): 2}


class Tables(ctypes.Structure):
    """``nf4_tables`` of nf4.h."""

    _fields_ = (
        ("levels", c_float * 16),
        ("bin_threshold", c_float * 32),
        ("bin_code", c_int32 * 32),
        ("thresholds", c_float * 16),
        ("nested_map", c_float * 256),
        ("nested_bounds", c_float * 256),
        ("nested_base", c_uint8 * 32768),
    )


@cache
def c_tables() -> Tables:
    """Copy the tables into the structure of nf4.h, once.

    Returns
    -------
    Tables
        Read by every call into the library.
    """
    made, source = Tables(), tables()
    for name, kind in Tables._fields_:
        setattr(made, name, kind.from_buffer_copy(getattr(source, name).tobytes()))
    return made


@cache
def library() -> ctypes.CDLL | None:
    """Load the shared library beside this file.

    Returns
    -------
    ctypes.CDLL or None
        None when it was not built; with a warning, too, when it cannot be loaded or belongs to
        another version, as that of a checkout does that was updated and not installed again.
    """
    for name in _NAMES:
        path = Path(__file__).with_name(name)
        if not path.is_file():
            continue
        try:
            loaded = ctypes.CDLL(str(path))
            if loaded.nf4_interface() == _INTERFACE:
                return _declare(loaded)
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


def _declare(lib: ctypes.CDLL) -> ctypes.CDLL:
    pointer, size = c_void_p, c_int64
    lib.nf4_quantize.argtypes = [
        pointer, c_int, c_int, pointer, size, size, pointer, pointer,
    ]  # fmt: skip
    lib.nf4_dequantize.argtypes = [
        pointer, c_int, c_int, pointer, pointer, size, size, size, pointer, c_int,
    ]  # fmt: skip
    lib.nf4_dequantize_rows.argtypes = [
        pointer, c_int, c_int, pointer, pointer, pointer, c_float, size, size, size, size, size,
        pointer,
    ]  # fmt: skip
    lib.nf4_multiply_rows.argtypes = [
        pointer, c_int, c_int, pointer, pointer, pointer, c_float, size, size, size, size, pointer,
        size, pointer, size,
    ]  # fmt: skip
    lib.nf4_error.argtypes = [
        pointer, c_int, c_int, pointer, pointer, pointer, size, size, size, pointer, pointer,
    ]  # fmt: skip
    lib.nf4_sum_scales.argtypes = [pointer, size, pointer]
    lib.nf4_quantize_scales.argtypes = [pointer, pointer, c_float, size, pointer, pointer]
    lib.nf4_decode_scales.argtypes = [pointer, pointer, pointer, c_float, size, size, pointer]
    for name in (
        "dequantize",
        "dequantize_rows",
        "multiply_rows",
        "error",
        "sum_scales",
        "quantize_scales",
        "decode_scales",
    ):
        getattr(lib, f"nf4_{name}").restype = None
    return lib


def supported() -> tuple[str, ...]:
    """List the instruction sets that the library has and this CPU can run.

    Returns
    -------
    tuple of str
        Slowest first; empty without a library.
    """
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
        self.name = isa
        self._lib, self._isa = lib, ISAS.index(isa)
        self._owned = c_tables()  # its address alone would not keep it
        self._tables = ctypes.addressof(self._owned)

    def quantize(self, x: Array, block_size: int, packed: Array, absmax: Array) -> bool:
        """See `Kernel.quantize`."""
        finite: int = self._lib.nf4_quantize(
            self._tables,
            self._isa,
            _DTYPES[x.dtype],
            address(x),
            x.size,
            block_size,
            address(packed),
            address(absmax),
        )
        return bool(finite)

    def sum_scales(self, absmax: Array, sums: Array) -> None:
        """See `Kernel.sum_scales`."""
        self._lib.nf4_sum_scales(address(absmax), absmax.size, address(sums))

    def quantize_scales(
        self, absmax: Array, offset: float, codes: Array, nested_absmax: Array
    ) -> None:
        """See `Kernel.quantize_scales`."""
        self._lib.nf4_quantize_scales(
            self._tables,
            address(absmax),
            offset,
            absmax.size,
            address(codes),
            address(nested_absmax),
        )

    def decode_scales(
        self, codes: Array, nested_absmax: Array, offset: float, start: int, out: Array
    ) -> None:
        """See `Kernel.decode_scales`."""
        self._lib.nf4_decode_scales(
            self._tables,
            address(codes),
            address(nested_absmax),
            offset,
            start,
            start + out.size,
            address(out),
        )

    def dequantize(
        self,
        packed: Array,
        scales: Array,
        block_size: int,
        start: int,
        out: Array,
        streaming: bool,
    ) -> None:
        """See `Kernel.dequantize`."""
        self._lib.nf4_dequantize(
            self._tables,
            self._isa,
            _DTYPES[out.dtype],
            address(packed),
            address(scales),
            block_size,
            start,
            start + out.size,
            address(out),
            streaming,
        )

    def dequantize_rows(self, codes: Codes, start: int, stride: int, out: Array) -> None:
        """See `Kernel.dequantize_rows`."""
        self._lib.nf4_dequantize_rows(
            self._tables,
            self._isa,
            _DTYPES[out.dtype],
            *_pointers(codes),
            start,
            stride,
            *out.shape,
            address(out),
        )

    def multiply_rows(
        self, codes: Codes, start: int, dtype: numpy.dtype[Any], x: Array, out: Array
    ) -> None:
        """See `Kernel.multiply_rows`."""
        for first in range(0, len(x), _DOT_TOKENS):
            self._lib.nf4_multiply_rows(
                self._tables,
                self._isa,
                _DTYPES[dtype],
                *_pointers(codes),
                start,
                out.shape[1],
                x.shape[1],
                address(x) + first * x.strides[0],
                min(_DOT_TOKENS, len(x) - first),
                address(out) + first * out.strides[0],
                out.strides[0] // out.itemsize,
            )

    def error(self, x: Array, packed: Array, scales: Array, block_size: int, sums: Array) -> None:
        """See `Kernel.error`."""
        self._lib.nf4_error(
            self._tables,
            self._isa,
            _DTYPES[x.dtype],
            address(x),
            address(packed),
            address(scales),
            block_size,
            0,
            x.size,
            address(sums),
            address(sums) + sums.strides[0],
        )


def address(array: Array) -> int:
    """Return where an array's first element is in memory."""
    where: int = array.__array_interface__["data"][0]
    return where


def _pointers(codes: Codes) -> tuple[int, int, int | None, float, int]:
    """Return codes as the C functions of rows take them."""
    return *codes.addresses, codes.nested_offset, codes.block_size
