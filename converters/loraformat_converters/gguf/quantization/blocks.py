"""Dequantization and quantization of GGUF types in row tiles.

The plain types (F32, F16, BF16, F64, I8 to I64) are dtypes of numpy. Block types are read by
`gguf.quants`, bit for bit as ggml does, and made by `block_bytes`.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import numpy

from loraformat.errors import InputError, UnsupportedError, printable
from loraformat.nf4.kernels.cast import cast, widened
from loraformat.nf4.kernels.threads import run
from loraformat.tensors.arrays import Array, array_bytes, array_view, numpy_dtype
from loraformat_converters.gguf.container.types import GGMLType
from loraformat_converters.gguf.quantization.block_bytes import store_blocks

__all__ = [
    "DEQUANTIZABLE",
    "QUANTIZABLE",
    "dequantize",
    "quantize",
    "quantized_tiles",
    "storable_type",
]

#: Stored as safetensors stores the type of that name.
_PLAIN = frozenset(
    GGMLType[name] for name in ("F32", "F16", "BF16", "F64", "I8", "I16", "I32", "I64")
)
_UNREADABLE = {GGMLType.Q8_1, GGMLType.Q8_K, GGMLType.Q1_0}
#: What `dequantize` takes.
DEQUANTIZABLE = frozenset(GGMLType) - _UNREADABLE
#: What `quantize` makes.
QUANTIZABLE = frozenset(
    GGMLType[name]
    for name in ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")
)  # fmt: skip
#: Numbers in a tile, which one thread takes: large enough for numpy, small enough for a cache.
_TILE = 1 << 18
#: Numbers of which the stored bytes are handed over at a time.
_WINDOW = 1 << 22
#: From here on float16 rounds to infinity.
_F16_OVERFLOW = 65520.0


def dequantize(
    view: memoryview,
    type: GGMLType,
    shape: tuple[int, ...],
    name: str = "",
    *,
    threads: int | None = None,
) -> Array:
    """Return stored numbers as float32.

    Parameters
    ----------
    view : memoryview
        A tensor's bytes.
    type : GGMLType
    shape : tuple of int
        As numpy counts.
    name : str
        Of the tensor, for messages.
    threads : int, optional
        1 in a thread that shares work with others; every CPU by default.

    Returns
    -------
    numpy.ndarray
        float32, of that shape. Of an F32 tensor a view, for reading; integers beyond 2^24
        and F64 are rounded to nearest even.

    Raises
    ------
    UnsupportedError
        If the type is one that cannot be dequantized.
    """
    if type in _PLAIN:
        return widened(array_view(view, type.name, shape))
    if type in _UNREADABLE:
        raise UnsupportedError(
            f"tensor {printable(name)} is of type {type.name}, which only ggml can read",
            hint="use a file of another type, Q8_0 or F16 say",
        )
    kind = _foreign_type(type, name)
    from gguf import quants

    rows, length = prod(shape[:-1]), shape[-1]
    stored = numpy.frombuffer(view, dtype=numpy.uint8).reshape(rows, type.row_bytes(length))
    numbers = numpy.empty((rows, length), dtype=numpy.float32)

    def tile(begin: int, end: int) -> None:
        with numpy.errstate(all="ignore"):  # a scale may be infinite; so is the number then
            numbers[begin:end] = quants.dequantize(stored[begin:end], kind)

    run(tile, rows, _rows_of(_TILE, length), threads)
    return numbers.reshape(shape)


def _foreign_type(type: GGMLType, name: str) -> object:
    """Return the type as the installed gguf package knows it, if it does."""
    from gguf import GGMLQuantizationType
    from gguf.quants import _type_traits

    if any(known == type.value for known in _type_traits):
        return GGMLQuantizationType(type.value)
    raise UnsupportedError(
        f"tensor {printable(name)} is of type {type.name}, which the installed gguf package "
        "cannot compute",
        hint="run: pip install --upgrade gguf",
    )


def _rows_of(numbers: int, length: int) -> int:
    return max(1, numbers // length)


def storable_type(type: GGMLType, length: int) -> GGMLType:
    """Return the type in which rows of ``length`` numbers can be stored: F16 where it cannot.

    llama.cpp's own converter falls back to F16, too; it is for the caller to say so.

    Examples
    --------
    >>> storable_type(GGMLType.Q8_0, 8).name
    'F16'
    """
    return type if length % type.block == 0 else GGMLType.F16


def quantize(tensor: Array, type: GGMLType, name: str = "") -> bytes:
    """Return a tensor's bytes in a type; see `quantized_tiles`."""
    return b"".join(quantized_tiles(tensor, type, name))


def quantized_tiles(tensor: Array, type: GGMLType, name: str = "") -> Iterator[bytes | memoryview]:
    """Yield a tensor's bytes in a type, some rows at a time.

    Parameters
    ----------
    tensor : numpy.ndarray
        Floating; rows are its last dimension. NaN and infinities are kept by F32, F16 and
        BF16.
    type : GGMLType
        One of `QUANTIZABLE`. F16 and BF16 round to nearest even; for block types see
        `loraformat_converters.gguf.quantization.block_bytes`.
    name : str
        Of the tensor, for messages.

    Raises
    ------
    UnsupportedError
        If the type is none of them, a row does not fill its blocks, or a finite number is
        beyond F16, in which blocks have their scales.
    InputError
        If a number is not finite and the type is one of blocks.
    """
    if type not in QUANTIZABLE:
        wanted = ", ".join(sorted(kind.name for kind in QUANTIZABLE))
        raise UnsupportedError(f"cannot make numbers of type {type.name}, wanted one of {wanted}")
    rows = tensor.reshape(-1, tensor.shape[-1] if tensor.ndim else 1)
    length = rows.shape[1]
    if length % type.block:
        raise UnsupportedError(
            f"tensor {printable(name)} has rows of {length} numbers, and {type.name} "
            f"wants a multiple of {type.block}"
        )
    step = _rows_of(_WINDOW, length)
    for begin in range(0, rows.shape[0], step):
        window = rows[begin : begin + step]
        if type in _PLAIN and window.dtype == numpy_dtype(type.name):
            yield array_bytes(window)
            continue
        stored = numpy.empty((len(window), type.row_bytes(length)), numpy.uint8)

        def tile(begin: int, end: int, window: Array = window, stored: Array = stored) -> None:
            _store(window[begin:end], stored[begin:end], type, name)

        run(tile, len(window), _rows_of(_TILE, length))
        yield array_bytes(stored)


def _store(tile: Array, stored: Array, type: GGMLType, name: str) -> None:
    """Write the bytes of some rows into an array of uint8, row by row."""
    if type in (GGMLType.F32, GGMLType.BF16):
        stored.view(numpy_dtype(type.name))[...] = widened(tile)
        return
    _check_range(tile if tile.dtype.itemsize > 2 else widened(tile), type, name)
    if type is GGMLType.F16:
        cast(widened(tile), stored.view(numpy.float16))
    else:
        store_blocks(widened(tile), stored, type)


def _check_range(tile: Array, type: GGMLType, name: str) -> None:
    if tile.min() > -_F16_OVERFLOW and tile.max() < _F16_OVERFLOW:  # not so if there is a NaN
        return
    what = f"tensor {printable(name)} holds"
    finite = numpy.isfinite(tile)
    if type is not GGMLType.F16 and not finite.all():
        raise InputError(
            f"{what} {tile[~finite][0].item()}, and {type.name} can only store finite numbers",
            hint="repair the checkpoint",
        )
    beyond = tile[finite & (numpy.abs(tile) >= _F16_OVERFLOW)]
    if beyond.size:
        raise UnsupportedError(
            f"{what} {beyond[0].item()}, beyond the largest F16 number, 65504",
            hint="use bf16 or f32",
        )
