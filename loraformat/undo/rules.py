"""Parsing and validation of undo records.

What needs the merged model or the adapters is checked in `loraformat.ops.unmerge.undoing`. Nothing
here reads files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from math import prod
from os import PathLike
from typing import Any

from loraformat.errors import FormatError, printable
from loraformat.storage import strict_json
from loraformat.tensors.dtypes import FORMAT_DTYPES, ITEM_BYTES
from loraformat.tensors.header import Entry, Header, is_clean_name
from loraformat.undo.record import (
    FORMULA,
    METADATA_KEY,
    VERSION,
    AdapterRecord,
    UndoRecord,
    UndoTensor,
    part_names,
)

__all__ = ["parse_record", "tile_rows"]

_DIGEST = re.compile("[0-9a-f]{64}")
_VERSION = re.compile("1\\.(0|[1-9][0-9]{0,5})")
_FLOATS = ("F32", "F16", "BF16")
_LIMIT = 1 << 31
_RECORD = ("created_by", "tile_elements", "adapters", "tensors", "unchanged", "config")
_ADAPTER = ("path", "sha256", "weight")
_TENSOR = ("mode", "dtype", "shape", "sha256", "merged_sha256", "terms", "rows")
_TERM = ("adapter", "target", "weight", "part", "block", "expert", "rows")


def parse_record(header: Header, path: str | PathLike[str]) -> UndoRecord:
    """Parse the record in a header's metadata and check the sizes of its parts.

    Raises `FormatError` U01, U02, U03 or U09.
    """
    text = header.metadata.get(METADATA_KEY)
    if text is None:
        raise FormatError("U01", "is not an undo record", path=path)
    try:
        members = strict_json.loads(text.encode())
    except (strict_json.StrictJsonError, UnicodeEncodeError) as error:
        raise FormatError("U02", f"its text is not strict JSON: {error}", path=path) from None
    version = members.get("version") if isinstance(members, dict) else None
    if not isinstance(version, str) or not _VERSION.fullmatch(version):
        raise FormatError(
            "U02", f"is of version {printable(version)}, wanted 1.x", path=path,
            hint="update loraformat",
        )  # fmt: skip
    if members.get("formula") != FORMULA:
        raise FormatError(
            "U02", f"uses the arithmetic {printable(members.get('formula'))}, wanted {FORMULA}",
            path=path, hint="update loraformat",
        )  # fmt: skip
    record = _Text(path, newer=version != VERSION).record(members)
    _check_parts(record, header.entries, path)
    return record


class _Text:
    """Parser of the record's text with the checks of rule U03."""

    def __init__(self, path: str | PathLike[str], *, newer: bool) -> None:
        self.path, self.newer = path, newer

    def need(self, holds: bool, what: str) -> None:
        if not holds:
            raise FormatError("U03", f"its text is malformed: {what}", path=self.path)

    def members(self, value: Any, names: tuple[str, ...], what: str) -> dict[str, Any]:
        self.need(isinstance(value, dict), f"{what} is not an object")
        missing = [name for name in names if name not in value]
        self.need(not missing, f"{what} lacks {', '.join(missing)}")
        more = [name for name in value if name not in names]
        self.need(self.newer or not more, f"{what} has more: {printable(more[:1])}")
        return {name: value[name] for name in names}

    def digest(self, value: Any, what: str) -> None:
        self.need(isinstance(value, str) and bool(_DIGEST.fullmatch(value)), f"{what}: no SHA-256")

    def number(self, value: Any, what: str) -> float:
        self.need(type(value) in (int, float) and math.isfinite(value), f"{what} is no number")
        return float(value)

    def integers(self, value: Any, most: int, limit: int, what: str) -> list[int]:
        sound = isinstance(value, list) and len(value) <= most
        sound = sound and all(type(n) is int and 0 <= n < limit for n in value)
        self.need(sound, f"{what} is not a list of at most {most} integers below {limit}")
        return list(value)

    def record(self, members: dict[str, Any]) -> UndoRecord:
        found = self.members(members, ("version", "formula", *_RECORD), "the record")
        self.need(isinstance(found["created_by"], str), "created_by is no text")
        elements = found["tile_elements"]
        self.need(type(elements) is int and 1 <= elements < _LIMIT, "tile_elements is odd")
        self.need(isinstance(found["config"], str | None), "config is no text")
        for name in ("tensors", "unchanged"):
            self.need(isinstance(found[name], dict), f"{name} is not an object")
            self.need(all(map(is_clean_name, found[name])), f"{name} has a name that is none")
        both = min(found["tensors"].keys() & found["unchanged"].keys(), default=None)
        self.need(both is None, f"{printable(both)} is changed and unchanged")
        for name, value in found["unchanged"].items():
            self.digest(value, printable(name))
        self.need(isinstance(found["adapters"], list), "adapters is no list")
        adapters = [self.adapter(fields) for fields in found["adapters"]]
        tensors = {
            name: self.tensor(one, printable(name)) for name, one in found["tensors"].items()
        }
        parsed = {"adapters": adapters, "tensors": tensors}
        return UndoRecord(**{name: found[name] for name in _RECORD} | parsed)

    def adapter(self, value: Any) -> AdapterRecord:
        fields = self.members(value, _ADAPTER, "an adapter")
        self.need(isinstance(fields["path"], str), "an adapter's path is no text")
        self.digest(fields["sha256"], "an adapter")
        return AdapterRecord(**fields | {"weight": self.number(fields["weight"], "a weight")})

    def tensor(self, value: Any, name: str) -> UndoTensor:
        fields = self.members(value, _TENSOR, name)
        mode, dtype = fields["mode"], fields["dtype"]
        self.need(mode in ("interval", "raw", "rows", "new"), f"mode of {name}")
        shape = tuple(self.integers(fields["shape"], 8, 1 << 48, f"shape of {name}"))
        self.digest(fields["merged_sha256"], name)
        if mode == "new":
            self.need(dtype == "" and shape == () and fields["sha256"] == "", f"{name} is new")
        else:
            self.need(isinstance(dtype, str) and dtype in FORMAT_DTYPES, f"dtype of {name}")
            self.digest(fields["sha256"], name)
        if mode == "interval":
            self.need(dtype in _FLOATS and len(shape) <= 3, f"no intervals for {name}")
        self.need(mode != "rows" or bool(shape), f"{name} has no rows")
        many = shape[0] if mode == "rows" else 0
        rows = self.integers(fields["rows"], many, many, f"rows of {name}")
        self.need(rows == sorted(set(rows)), f"rows of {name} are not ascending")
        self.need(isinstance(fields["terms"], list), f"terms of {name}")
        self.need(mode == "interval" or not fields["terms"], f"{name} has terms")
        terms = [self.term(term, f"a term of {name}") for term in fields["terms"]]
        return UndoTensor(**fields | {"shape": shape, "terms": terms, "rows": rows})

    def term(self, value: Any, what: str) -> dict[str, Any]:
        fields = self.members(value, _TERM, what)
        self.number(fields["weight"], f"the weight of {what}")
        self.need(isinstance(fields["target"], str), f"the target of {what}")
        self.need(fields["part"] in ("delta", "bias"), f"the part of {what}")
        for name in ("adapter", "block", "expert"):
            whole = type(fields[name]) is int and 0 <= fields[name] < _LIMIT
            self.need(whole or (name == "expert" and fields[name] is None), f"{name} of {what}")
        if fields["rows"] is not None:
            rows = self.integers(fields["rows"], 2, _LIMIT, f"rows of {what}")
            self.need(len(rows) == 2, f"rows of {what}")
            fields["rows"] = tuple(rows)
        return fields


def tile_rows(shape: tuple[int, ...], tile_elements: int) -> tuple[int, int, int, int]:
    """Return a tensor's matrices, their rows and columns, and the rows of a tile.

    Examples
    --------
    >>> tile_rows((3, 100, 16), 64)
    (3, 100, 16, 4)
    """
    columns = shape[-1] if shape else 1
    rows = shape[-2] if len(shape) > 1 else 1
    stack = shape[0] if len(shape) == 3 else 1
    return stack, rows, columns, max(1, tile_elements // max(columns, 1))


def _sizes(record: UndoRecord, name: str) -> Iterator[tuple[str, int | None]]:
    """Yield the parts that a tensor may have, with sizes in bytes; None if variable."""
    tensor = record.tensors[name]
    residual, zeros, gains, lengths = part_names(name)
    nbytes = prod(tensor.shape) * ITEM_BYTES.get(tensor.dtype, 0)
    if tensor.mode == "raw":
        yield residual, nbytes
    elif tensor.mode == "rows":
        width = prod(tensor.shape[1:]) * ITEM_BYTES[tensor.dtype]
        yield residual, width * len(tensor.rows)
    elif tensor.mode == "interval":
        stack, rows, _, step = tile_rows(tensor.shape, record.tile_elements)
        yield lengths, 8 * stack * -(-rows // step)
        yield from ((part, None) for part in (residual, zeros, gains))


def _check_parts(
    record: UndoRecord, entries: Mapping[str, Entry], path: str | PathLike[str]
) -> None:
    left = set(entries)
    for tensor in record.tensors:
        for name, wanted in _sizes(record, tensor):
            left.discard(name)
            entry = entries.get(name)
            nbytes = 0 if entry is None else entry.nbytes
            if wanted is not None and nbytes != wanted:
                raise FormatError(
                    "U09", f"its part {printable(name)} has {nbytes} bytes, wanted {wanted}",
                    path=path, hint="the record is damaged",
                )  # fmt: skip
            if entry is not None and (entry.dtype != "U8" or len(entry.shape) != 1):
                raise FormatError("U09", f"its part {printable(name)} is not of bytes", path=path)
            if wanted is None and nbytes % {".zeros": 8, ".gains": 4}.get(name[-6:], 1):
                raise FormatError(
                    "U09", f"its part {printable(name)} ends within a number", path=path
                )
    if left:
        raise FormatError(
            "U09", f"its part {printable(min(left))} is of no tensor", path=path,
            hint="the record is damaged",
        )  # fmt: skip
