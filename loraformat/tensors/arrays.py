"""numpy arrays over stored bytes, of every dtype that safetensors has.

Types that numpy lacks come from ml_dtypes, the extension that numpy's own users of them share:
``bfloat16`` and the 8-bit floats. They are for storing: nothing here computes in them, whoever
computes widens to float32 first (exact) and rounds once at the end (to nearest even).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeAlias

import ml_dtypes
import numpy

from loraformat.errors import InputError, printable
from loraformat.tensors.dtypes import ITEM_BYTES, TORCH_NAMES

__all__ = [
    "Array",
    "array_bytes",
    "array_view",
    "check_finite",
    "dtype_name",
    "finite",
    "numpy_dtype",
    "same_bytes",
]

#: An array of any dtype and shape; docstrings say which.
Array: TypeAlias = numpy.ndarray[Any, numpy.dtype[Any]]

_DTYPES: dict[str, numpy.dtype[Any]] = {
    name: numpy.dtype(getattr(ml_dtypes, word, f"<{name[0].lower()}{ITEM_BYTES[name]}"))
    for name, word in TORCH_NAMES.items()
}
#: Of a comparison at once: what it tells of each byte stays in a core's second cache.
_COMPARED_BYTES = 1 << 18
_WITH_INFINITY = [_DTYPES[name] for name in ("F16", "BF16", "F32", "F64")]
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def numpy_dtype(name: str) -> numpy.dtype[Any]:
    """Return the numpy dtype for a safetensors dtype name.

    Examples
    --------
    >>> numpy_dtype("BF16"), numpy_dtype("F32")
    (dtype(bfloat16), dtype('float32'))
    """
    return _DTYPES[name]


def dtype_name(dtype: numpy.dtype[Any] | type) -> str:
    """Return the safetensors name of a numpy dtype; raises `KeyError` if it has none.

    Examples
    --------
    >>> dtype_name(numpy.float32), dtype_name(numpy_dtype("BF16"))
    ('F32', 'BF16')
    """
    return _NAMES[numpy.dtype(dtype)]


def array_view(data: memoryview, dtype: str, shape: tuple[int, ...] | None = None) -> Array:
    """Show flat bytes, row-major and little-endian, as an array of a safetensors dtype.

    Nothing is copied where alignment allows. If the bytes are read-only, so is the array; without a
    shape it has one dimension.

    Examples
    --------
    >>> array_view(memoryview(bytes(4)), "BF16").shape
    (2,)
    """
    flat = numpy.frombuffer(data, numpy.uint8)
    if flat.ctypes.data % ITEM_BYTES[dtype]:
        flat = flat.copy()
    values = flat.view(_DTYPES[dtype])
    return values if shape is None else values.reshape(shape)


def array_bytes(array: Array) -> memoryview:
    r"""Return an array's bytes, flat and row-major; the opposite of `array_view`.

    Examples
    --------
    >>> bytes(array_bytes(numpy.array([1, 256], dtype=numpy.int16)))
    b'\x01\x00\x00\x01'
    """
    return numpy.ascontiguousarray(array).reshape(-1).view(numpy.uint8).data


def finite(array: Array) -> bool:
    """Tell whether an array of floats holds neither NaN nor infinity.

    Examples
    --------
    >>> finite(numpy.array([1.0, numpy.inf], dtype=numpy.float16))
    False
    """
    if array.dtype not in _WITH_INFINITY or not array.size:
        return bool(numpy.isfinite(array).all())
    # As integers, what is not finite is at the end of either sign: many times faster than to
    # look at 16-bit floats one by one, and without an array of truth values.
    bits = 8 * array.itemsize
    infinity = int(numpy.array(numpy.inf, array.dtype).view(f"u{array.itemsize}"))
    positive, negative = (array.view(f"{sign}{array.itemsize}").max() for sign in "iu")
    return bool(positive < infinity and negative < infinity + (1 << bits - 1))


def same_bytes(one: memoryview, other: memoryview) -> bool:
    """Tell whether two runs of bytes are the same, with no copy of either.

    Examples
    --------
    >>> same_bytes(memoryview(b"ab"), memoryview(b"ac"))
    False
    """
    first, second = (numpy.frombuffer(data, numpy.uint8) for data in (one, other))
    return len(first) == len(second) and all(
        numpy.array_equal(first[i : i + _COMPARED_BYTES], second[i : i + _COMPARED_BYTES])
        for i in range(0, len(first), _COMPARED_BYTES)
    )


def check_finite(
    values: Array, name: str, path: Path | None = None, *, error: type[InputError] = InputError
) -> None:
    """Refuse NaN and infinity in the values of a tensor, by an error of a given class."""
    if not finite(values):
        raise error(
            f"tensor {printable(name)} holds NaN or infinity",
            path=path,
            hint="the file is damaged, or its training diverged: use an earlier checkpoint",
        )
