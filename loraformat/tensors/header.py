"""Parsing and serialization of the safetensors header.

A safetensors file is an 8-byte little-endian length, a JSON header of that
length, and the tensors' bytes. This module knows the header alone: it reads no
file. Rules ``H..`` hold for every safetensors file that loraformat opens, rules
``L01`` and ``L02`` for the shards of a bundle (``profile=True``).
See ``spec/loraformat-1.1.md``, section "Shards".
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from os import PathLike
from typing import Any

from loraformat.errors import FormatError, UnsupportedError, printable
from loraformat.storage import strict_json
from loraformat.tensors.dtypes import FORMAT_DTYPES, ITEM_BYTES, UNREAD_DTYPES

__all__ = [
    "DATA_ALIGNMENT",
    "MAX_HEADER_BYTES",
    "Entry",
    "Header",
    "data_start",
    "encode_header",
    "is_clean_name",
    "is_clean_text",
    "parse_header",
]

#: Longest header that is read, in bytes; the limit of the safetensors library.
MAX_HEADER_BYTES = 100_000_000
#: In a bundle, the first tensor byte lies on a multiple of this (bytes).
DATA_ALIGNMENT = 4096

_LENGTH_BYTES = 8
_MAX_NAME_BYTES = 512
_MAX_DIMENSIONS = 8
_MAX_DIMENSION = 1 << 48
# Spelled out: what ``str.isprintable`` refuses depends on the Unicode version of the interpreter.
_UNCLEAN = re.compile(
    "[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)


@dataclass(frozen=True, slots=True)
class Entry:
    """One stored tensor.

    Attributes
    ----------
    name : str
    dtype : str
        safetensors dtype name, ``"BF16"`` for example.
    shape : tuple of int
    begin, end : int
        Byte range, counted from the first byte after the header.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.end - self.begin


@dataclass(frozen=True, slots=True)
class Header:
    """A parsed header.

    Attributes
    ----------
    entries : dict of str to Entry
        In the order of their bytes in the file.
    metadata : dict of str to str
        The ``__metadata__`` object, empty if absent.
    data_start : int
        Position in the file of the first tensor byte.
    """

    entries: dict[str, Entry]
    metadata: dict[str, str] = field(default_factory=dict)
    data_start: int = _LENGTH_BYTES


def is_clean_text(text: object) -> bool:
    r"""Tell whether something is text without control characters, also bidirectional ones.

    Examples
    --------
    >>> is_clean_text("Größe 3"), is_clean_text("\x1b[31m")
    (True, False)
    """
    return isinstance(text, str) and not _UNCLEAN.search(text)


def is_clean_name(name: object) -> bool:
    r"""Tell whether a tensor name is 1 to 512 bytes of clean text without ``/`` or ``\``.

    Examples
    --------
    >>> is_clean_name("model.norm.weight"), is_clean_name("../x"), is_clean_name("a\x00b")
    (True, False, False)
    """
    return (
        isinstance(name, str)
        and 0 < len(name) <= _MAX_NAME_BYTES
        and is_clean_text(name)
        and len(name.encode("utf-8")) <= _MAX_NAME_BYTES
        and "/" not in name
        and "\\" not in name
    )


def data_start(prefix: bytes, file_bytes: int, path: str | PathLike[str]) -> int:
    """Return where the tensors begin, from the first eight bytes of a file (rule H01).

    `prefix` has fewer bytes if the file is shorter. A file that cannot hold the header that they
    announce is refused.
    """
    if len(prefix) < _LENGTH_BYTES:
        raise FormatError(
            "H01",
            f"only {file_bytes} bytes long, too short for a safetensors file",
            path=path,
            hint="the download is incomplete or this is another kind of file",
        )
    length = int.from_bytes(prefix[:_LENGTH_BYTES], "little")
    room = file_bytes - _LENGTH_BYTES
    if not 2 <= length <= min(room, MAX_HEADER_BYTES):
        raise FormatError(
            "H01",
            f"announces a header of {length} bytes, wanted 2 to {min(room, MAX_HEADER_BYTES)}",
            path=path,
            hint="the file is truncated or is not safetensors; download it again",
        )
    return _LENGTH_BYTES + length


def parse_header(
    raw: bytes,
    file_bytes: int,
    path: str | PathLike[str],
    *,
    profile: bool = False,
    foreign: bool = False,
) -> Header:
    """Parse and check the JSON header of a safetensors file.

    Parameters
    ----------
    raw : bytes
        The header without its length prefix.
    file_bytes : int
        Size of the whole file in bytes.
    path : path-like
        For messages.
    profile : bool
        Also hold the file to the rules for shards of a bundle (L01, L02).
    foreign : bool
        It is no part of a bundle: it may have types that the specification has not (H06).

    Raises
    ------
    FormatError
        Naming the broken rule, H02 to H09, L01 or L02.
    UnsupportedError
        If a foreign file has a type that safetensors names and nothing here reads.

    Examples
    --------
    >>> raw = b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    >>> parse_header(raw, 8 + len(raw) + 8, "x.safetensors").entries["w"].shape
    (2,)
    """
    fields, metadata = _parse_json(raw, path)
    entries = [_entry(name, value, path, foreign) for name, value in fields.items()]
    start = _LENGTH_BYTES + len(raw)
    ordered = sorted(entries, key=lambda entry: (entry.begin, entry.end))
    _check_coverage(ordered, file_bytes - start, path)
    if profile:
        _check_profile(entries, ordered, start, path)
    return Header({entry.name: entry for entry in ordered}, metadata, start)


def _parse_json(raw: bytes, path: str | PathLike[str]) -> tuple[dict[str, Any], dict[str, str]]:
    if raw[:1] != b"{":
        raise FormatError("H02", f"header begins with {raw[:1]!r}, wanted '{{'", path=path)
    if not raw.rstrip(b" ").endswith(b"}"):
        raise FormatError("H02", "header does not end with '}' and spaces", path=path)
    try:
        fields = strict_json.loads(raw)
    except strict_json.StrictJsonError as error:
        raise FormatError("H03", f"header is not strict JSON: {error}", path=path) from None
    metadata = fields.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise FormatError("H04", "__metadata__ is not an object of strings", path=path)
    return fields, metadata


def _are_counts(values: Any, limit: int, lengths: range) -> bool:
    few = isinstance(values, list) and len(values) in lengths
    return few and all(type(n) is int and 0 <= n < limit for n in values)


def _entry(name: str, value: Any, path: str | PathLike[str], foreign: bool) -> Entry:
    def broken(rule: str, problem: str) -> FormatError:
        return FormatError(rule, f"tensor {printable(name)} {problem}", path=path)

    if not is_clean_name(name):
        raise broken(
            "H05", "has a name that is empty, too long, or holds '/', '\\' or control characters"
        )
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise broken("H06", "must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if foreign and isinstance(dtype, str) and dtype in UNREAD_DTYPES:
        raise UnsupportedError(
            f"tensor {printable(name)} is of type {dtype} ({UNREAD_DTYPES[dtype]}), which is not "
            "read here",
            path=path,
            hint="start from the original, unquantized model, or from a copy in bfloat16 or "
            "float8; the model's page on the Hub lists it as base model",
        )
    if not isinstance(dtype, str) or dtype not in (ITEM_BYTES if foreign else FORMAT_DTYPES):
        raise broken("H06", f"has unknown dtype {printable(dtype)}")
    if not _are_counts(shape, _MAX_DIMENSION, range(_MAX_DIMENSIONS + 1)):
        raise broken(
            "H06", f"has shape {printable(shape)}, wanted at most 8 integers from 0 to 2^48"
        )
    if not _are_counts(offsets, 1 << 63, range(2, 3)):
        raise broken("H06", f"has data_offsets {printable(offsets)}, wanted two integers")
    begin, end = offsets
    needed = prod(shape) * ITEM_BYTES[dtype]  # Python integers: no overflow
    if end - begin != needed:
        raise broken("H07", f"spans {end - begin} bytes, but {dtype} {shape} takes {needed}")
    return Entry(name, dtype, tuple(shape), begin, end)


def _check_coverage(ordered: list[Entry], data_bytes: int, path: str | PathLike[str]) -> None:
    position = 0
    for entry in ordered:
        if entry.begin != position:
            kind = "overlaps the tensor" if entry.begin < position else "leaves a hole"
            raise FormatError(
                "H08",
                f"tensor {printable(entry.name)} begins at data byte {entry.begin} and {kind} "
                f"before it, wanted {position}",
                path=path,
            )
        position = entry.end
    if position != data_bytes:
        raise FormatError(
            "H09",
            f"holds {data_bytes} bytes of tensor data, but its header describes {position}",
            path=path,
            hint="the file is truncated or has trailing bytes; download it again",
        )


def _check_profile(
    entries: list[Entry], ordered: list[Entry], start: int, path: str | PathLike[str]
) -> None:
    if start % DATA_ALIGNMENT:
        raise FormatError(
            "L01",
            f"tensor data begins at byte {start}, wanted a multiple of {DATA_ALIGNMENT}",
            path=path,
        )
    for written, stored in zip(entries, ordered, strict=True):
        if written.name != stored.name:
            raise FormatError(
                "L02",
                f"header lists tensor {printable(written.name)} where the data holds "
                f"{printable(stored.name)}; the header's order must be the data's",
                path=path,
            )


def encode_header(
    entries: Iterable[Entry],
    metadata: Mapping[str, str],
    *,
    alignment: int = 8,
    room: int | None = None,
) -> bytes:
    """Write a header: length prefix, compact JSON, spaces up to the alignment.

    Entries are in the order of their bytes; metadata is written first, as ``__metadata__``, unless
    empty. The length is a multiple of `alignment` (bytes), or exactly `room`, for a header that is
    written after its tensors.

    Examples
    --------
    >>> encode_header([Entry("w", "F32", (2,), 0, 8)], {}, alignment=64)[8:]
    b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}  '
    """
    fields: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    for entry in entries:
        fields[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [entry.begin, entry.end],
        }
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    total = _LENGTH_BYTES + len(text)
    full = room if room is not None else -(-total // alignment) * alignment
    assert total <= full, "the room reserved for a header must hold it"
    return (full - _LENGTH_BYTES).to_bytes(8, "little") + text.ljust(full - _LENGTH_BYTES, b" ")
