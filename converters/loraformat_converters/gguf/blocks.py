"""Stored numbers to float32 and back, a tile of rows at a time.

The plain types (F32, F16, BF16, F64, I8 to I64) are torch's own. The block types are
computed by `gguf.quants`, which is bit-identical to ggml wherever both can do it; it
quantizes fewer types than it dequantizes.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import TYPE_CHECKING

from loraformat.errors import InputError, UnsupportedError, printable
from loraformat_converters.gguf.types import GGMLType

if TYPE_CHECKING:
    import torch

__all__ = [
    "DEQUANTIZABLE",
    "QUANTIZABLE",
    "dequantize",
    "quantize",
    "quantized_tiles",
    "storable_type",
]

#: Torch's name of each plain type.
_PLAIN = {
    GGMLType.F32: "float32",
    GGMLType.F16: "float16",
    GGMLType.BF16: "bfloat16",
    GGMLType.F64: "float64",
    GGMLType.I8: "int8",
    GGMLType.I16: "int16",
    GGMLType.I32: "int32",
    GGMLType.I64: "int64",
}
_UNREADABLE = {GGMLType.Q8_1, GGMLType.Q8_K, GGMLType.Q1_0}
#: What `dequantize` takes.
DEQUANTIZABLE = frozenset(GGMLType) - _UNREADABLE
#: What `quantize` makes.
QUANTIZABLE = frozenset(
    GGMLType[name]
    for name in ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")
)  # fmt: skip
#: Numbers in a tile: large enough for numpy, small beside a tensor.
_TILE = 1 << 20


def dequantize(
    view: memoryview, type: GGMLType, shape: tuple[int, ...], name: str = ""
) -> torch.Tensor:
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

    Returns
    -------
    torch.Tensor
        float32, of that shape. Of an F32 tensor a view, for reading; integers beyond 2^24
        and F64 are rounded to nearest even.

    Raises
    ------
    UnsupportedError
        If the type is one that cannot be dequantized.
    """
    import numpy
    import torch

    if type in _PLAIN:
        return _plain(view, type).view(shape).to(torch.float32)
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
    with numpy.errstate(all="ignore"):  # a scale may be infinite; so is the number then
        for begin, end in _tiles(rows, length):
            numbers[begin:end] = quants.dequantize(stored[begin:end], kind)
    return torch.from_numpy(numbers).view(shape)


def _plain(view: memoryview, type: GGMLType) -> torch.Tensor:
    from loraformat.checkpoint import tensor_view

    return tensor_view(view, type.name)


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


def _tiles(rows: int, length: int) -> Iterator[tuple[int, int]]:
    step = max(1, _TILE // length)
    for begin in range(0, rows, step):
        yield begin, min(begin + step, rows)


def storable_type(type: GGMLType, length: int) -> GGMLType:
    """Return the type in which rows of ``length`` numbers can be stored: F16 where it cannot.

    llama.cpp's own converter falls back to F16, too; it is for the caller to say so.

    Examples
    --------
    >>> storable_type(GGMLType.Q8_0, 8).name
    'F16'
    """
    return type if length % type.block == 0 else GGMLType.F16


def quantize(tensor: torch.Tensor, type: GGMLType, name: str = "") -> bytes:
    """Return a tensor's bytes in a type; see `quantized_tiles`."""
    return b"".join(quantized_tiles(tensor, type, name))


def quantized_tiles(tensor: torch.Tensor, type: GGMLType, name: str = "") -> Iterator[bytes]:
    """Yield a tensor's bytes in a type, some rows at a time.

    Parameters
    ----------
    tensor : torch.Tensor
        Floating; rows are its last dimension. NaN and infinities are kept by F32, F16 and
        BF16.
    type : GGMLType
        One of `QUANTIZABLE`. F16 and BF16 round to nearest even; the block types round as
        ggml does.
    name : str
        Of the tensor, for messages.

    Raises
    ------
    UnsupportedError
        If the type is none of them, a row does not fill its blocks, or a finite number is
        beyond F16.
    InputError
        If a number is not finite and the type is one of blocks.
    """
    import torch

    if type not in QUANTIZABLE:
        wanted = ", ".join(sorted(kind.name for kind in QUANTIZABLE))
        raise UnsupportedError(f"cannot make numbers of type {type.name}, wanted one of {wanted}")
    rows = tensor.detach().reshape(-1, tensor.shape[-1] if tensor.dim() else 1)
    if rows.shape[1] % type.block:
        raise UnsupportedError(
            f"tensor {printable(name)} has rows of {rows.shape[1]} numbers, and {type.name} "
            f"wants a multiple of {type.block}"
        )
    for begin, end in _tiles(*rows.shape):
        tile = rows[begin:end]
        if type in _PLAIN:
            stored = tile.to(getattr(torch, _PLAIN[type])).contiguous()
            if type is GGMLType.F16:
                _check_range(tile, stored, name)
            yield stored.view(torch.uint8).numpy().tobytes()
        else:
            yield _quantized(tile.to(torch.float32), type, name)


def _check_range(tile: torch.Tensor, stored: torch.Tensor, name: str) -> None:
    import torch

    lost = torch.isinf(stored) & torch.isfinite(tile)
    if lost.any():
        raise UnsupportedError(
            f"tensor {printable(name)} holds {tile[lost][0].item()}, beyond the largest F16 "
            "number, 65504",
            hint="use bf16 or f32",
        )


def _quantized(tile: torch.Tensor, type: GGMLType, name: str) -> bytes:
    import torch
    from gguf import GGMLQuantizationType, quants

    if not torch.isfinite(tile).all():
        strange = tile[~torch.isfinite(tile)][0].item()
        raise InputError(
            f"tensor {printable(name)} holds {strange}, and {type.name} can only store finite "
            "numbers",
            hint="repair the checkpoint",
        )
    stored = quants.quantize(tile.contiguous().numpy(), GGMLQuantizationType(type.value))
    return bytes(stored.tobytes())
