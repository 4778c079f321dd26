"""Parsing and validation of the GGUF header.

::

    magic "GGUF" · version u32 · tensor count u64 · key count u64
    keys:     key · type u32 · value
    tensors:  name · dimensions u32 · sizes u64 (fastest first) · type u32 · offset u64
    padding to the alignment, then the data of every tensor, each padded

Every number is a stranger's: it is compared with what the file can hold, as a Python int
that cannot wrap around, before anything of that size is read or made. Stricter than the
format's text, as llama.cpp is: tensors lie in the order of their list, each where the
padding of the one before ends. So none overlaps another, and no byte is unaccounted for.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

from loraformat.errors import UnsupportedError, printable
from loraformat_converters.gguf.container.cursor import Cursor
from loraformat_converters.gguf.container.keys import ValueSpan, read_keys
from loraformat_converters.gguf.container.types import GGMLType, ValueType
from loraformat_converters.gguf.container.values import GGUFValue

__all__ = ["DEFAULT_ALIGNMENT", "GGUFHeader", "GGUFTensor", "aligned", "parse_header"]

DEFAULT_ALIGNMENT = 32
#: Bounds on what a head may ask for, each far beyond any model's.
MAX_KEYS = 1 << 15
MAX_TENSORS = 1 << 15
MAX_NAME_BYTES = 63  # ggml's own
MAX_DIMENSIONS = 4
MAX_SIZE = 1 << 48
_SMALLEST_KEY = 8 + 1 + 4 + 1
_SMALLEST_TENSOR = 8 + 1 + 4 + 8 + 4 + 8
_U32 = struct.Struct("<I")
_GGML_TYPES = {member.value: member for member in GGMLType}
_REMOVED = {4: "Q4_2", 5: "Q4_3", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8",
            36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8"}  # fmt: skip
_ANCESTORS = {b"lmgg": "ggml", b"fmgg": "ggmf", b"tjgg": "ggjt", b"algg": "ggla"}


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """A tensor of a file.

    Attributes
    ----------
    name : str
    shape : tuple of int
        As numpy counts, ``(out, in)`` for a linear weight: GGUF stores them the other way round.
    type : GGMLType
    offset : int
        From the beginning of the file.
    nbytes : int
    part : int
        Which file holds it of a model that was split, from 0.
    """

    name: str
    shape: tuple[int, ...]
    type: GGMLType
    offset: int
    nbytes: int
    part: int = 0


@dataclass(frozen=True, slots=True)
class GGUFHeader:
    """What a head of version 2 or 3 says; tensors are in file order, the first at data_start."""

    version: int
    metadata: dict[str, GGUFValue]
    tensors: dict[str, GGUFTensor]
    alignment: int
    data_start: int


def aligned(position: int, alignment: int) -> int:
    """Return the next multiple of the alignment.

    Examples
    --------
    >>> aligned(33, 32)
    64
    """
    return -(-position // alignment) * alignment


def parse_header(
    read: Callable[[int, int], bytes | memoryview], nbytes: int, path: Path
) -> GGUFHeader:
    """Read and check the head of a file.

    Parameters
    ----------
    read : callable
        Returns the bytes between two positions, both inside the file.
    nbytes : int
        Size of the file.
    path : Path
        For messages.

    Raises
    ------
    UnsupportedError
        If it is sound, but of another version, byte order or type of numbers.
    InputError
        If it is damaged or hostile.
    """
    cursor = Cursor(read, nbytes, path)
    version = _version(cursor)
    tensor_count = cursor.u64("the tensor count")
    key_count = cursor.u64("the key count")
    _check_count(cursor, key_count, MAX_KEYS, _SMALLEST_KEY, "keys")
    _check_count(cursor, tensor_count, MAX_TENSORS, _SMALLEST_TENSOR, "tensors")
    spans = read_keys(cursor, key_count)
    alignment = _alignment(cursor, spans)
    entries = [_tensor(cursor, number) for number in range(tensor_count)]
    data_start = aligned(cursor.at, alignment)
    tensors = _placed(cursor, entries, data_start, alignment)
    whole = memoryview(cursor.bytes_so_far())
    metadata = {key: span.value(whole) for key, span in spans.items()}
    return GGUFHeader(version, metadata, tensors, alignment, data_start)


def _version(cursor: Cursor) -> int:
    if cursor.nbytes < 24:
        raise cursor.fail(f"is {cursor.nbytes} bytes long, and a GGUF file has at least 24")
    cursor.need(24, "the first fields")
    magic = bytes(cursor.data[:4])
    if magic in _ANCESTORS:
        raise UnsupportedError(
            f"is a {_ANCESTORS[magic]} file, an ancestor of GGUF",
            path=cursor.path,
            hint="convert the original model again with a current llama.cpp",
        )
    if magic != b"GGUF":
        raise cursor.fail(f"is no GGUF file: it begins with {printable(magic)}, wanted GGUF")
    cursor.at = 4
    version = cursor.u32("the version")
    if version & 0xFFFF == 0 and version:
        raise UnsupportedError(
            "is a big-endian GGUF file, and only little-endian ones can be read",
            path=cursor.path,
            hint="convert it with: gguf-convert-endian FILE little",
        )
    if version not in (2, 3):
        raise UnsupportedError(
            f"is of GGUF version {version}, wanted 2 or 3",
            path=cursor.path,
            hint="convert the original model again with a current llama.cpp",
        )
    return version


def _check_count(cursor: Cursor, count: int, limit: int, smallest: int, what: str) -> None:
    if count > limit:
        raise cursor.fail(f"claims {count} {what}, more than {limit}")
    if count * smallest > cursor.nbytes - cursor.at:
        raise cursor.fail(
            f"claims {count} {what}, more than its {cursor.nbytes} bytes can hold",
            hint="download or copy it again",
        )


def _alignment(cursor: Cursor, spans: dict[str, ValueSpan]) -> int:
    span = spans.get("general.alignment")
    if span is None:
        return DEFAULT_ALIGNMENT
    if span.type is not ValueType.UINT32:
        raise cursor.fail(f"general.alignment is a {span.type.name}, wanted a UINT32")
    (alignment,) = _U32.unpack_from(cursor.data, span.begin)
    if not 8 <= alignment <= 65536 or alignment & (alignment - 1):
        raise cursor.fail(
            f"general.alignment is {alignment}, wanted a power of two from 8 to 65536"
        )
    return int(alignment)


def _tensor(cursor: Cursor, number: int) -> GGUFTensor:
    """Read an entry of the list; its offset still counts from the first tensor."""
    name = cursor.name(MAX_NAME_BYTES, f"tensor {number}")
    what = f"tensor {printable(name)}"
    dimensions = cursor.u32(what)
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise cursor.fail(f"{what} has {dimensions} dimensions, wanted 1 to {MAX_DIMENSIONS}")
    sizes = [cursor.u64(what) for _ in range(dimensions)]
    if not all(0 < size < MAX_SIZE for size in sizes):
        raise cursor.fail(f"{what} has the shape {sizes}, wanted sizes from 1 to 2^48 - 1")
    kind = _ggml_type(cursor, what)
    if sizes[0] % kind.block:
        raise cursor.fail(
            f"{what} has rows of {sizes[0]} numbers, and {kind.name} wants a multiple of "
            f"{kind.block}"
        )
    nbytes = prod(sizes[1:]) * kind.row_bytes(sizes[0])
    return GGUFTensor(name, tuple(reversed(sizes)), kind, cursor.u64(what), nbytes)


def _ggml_type(cursor: Cursor, what: str) -> GGMLType:
    number = cursor.u32(what)
    if number in _GGML_TYPES:
        return _GGML_TYPES[number]
    if number in _REMOVED:
        raise UnsupportedError(
            f"{what} is of type {_REMOVED[number]}, which ggml has removed",
            path=cursor.path,
            hint="quantize the original model again with a current llama.cpp",
        )
    raise UnsupportedError(
        f"{what} is of the unknown type {number}",
        path=cursor.path,
        hint="a newer loraformat may know it, if the file is sound",
    )


def _placed(
    cursor: Cursor, entries: list[GGUFTensor], data_start: int, alignment: int
) -> dict[str, GGUFTensor]:
    tensors: dict[str, GGUFTensor] = {}
    expected = end = 0
    for entry in entries:
        what = f"tensor {printable(entry.name)}"
        if entry.name in tensors:
            raise cursor.fail(f"has the {what} twice")
        if entry.offset != expected:
            raise cursor.fail(_misplaced(what, entry.offset, expected, alignment))
        end = expected + entry.nbytes
        if data_start + end > cursor.nbytes:
            raise cursor.fail(
                f"{what} ends at byte {data_start + end}, and the file has {cursor.nbytes}",
                hint="download or copy it again",
            )
        expected = aligned(end, alignment)
        tensors[entry.name] = replace(entry, offset=data_start + entry.offset)
    last = data_start + expected
    if cursor.nbytes > last:
        raise cursor.fail(
            f"has {cursor.nbytes - last} bytes after its last tensor, which ends at byte {last}",
            hint="if you trust it, cut them off",
        )
    return tensors


def _misplaced(what: str, offset: int, expected: int, alignment: int) -> str:
    if offset % alignment:
        kind = f"which is not a multiple of {alignment}"
    elif offset < expected:
        kind = "inside the tensor before it"
    else:
        kind = "leaving a gap"
    return f"{what} begins at offset {offset}, {kind}; wanted {expected}"
