"""Data classes and serialization of the undo record.

What one merge loses of each tensor is in the interval code of `loraformat.undo.interval_code`; the
record adds which tensors, adapters and hashes it belongs to.

A record is a safetensors file: its ``__metadata__`` has one member, ``loraformat.undo``, a
JSON text. ``spec/undo-1.0.md`` has the rules; `loraformat.undo.rules` reads it. Nothing here
reads files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from loraformat.tensors.header import Entry, encode_header

__all__ = [
    "FORMULA",
    "METADATA_KEY",
    "VERSION",
    "AdapterRecord",
    "UndoRecord",
    "UndoTensor",
    "encode_record",
    "part_names",
]

#: Name of the arithmetic; another one gets another name.
FORMULA = "fixed-point-1"
METADATA_KEY = "loraformat.undo"

#: Of the records that are written.
VERSION = "1.0"


@dataclass(frozen=True, slots=True)
class AdapterRecord:
    """A merged adapter: path, hash of its deltas, weight."""

    path: str
    sha256: str
    weight: float


@dataclass(frozen=True, slots=True)
class UndoTensor:
    """How to restore one tensor.

    Attributes
    ----------
    mode : {"interval", "raw", "rows", "new"}
        Ranks of intervals; the original bytes; the original bytes of some rows; nothing: the
        tensor was made by the merge.
    dtype, shape
        Of the original.
    sha256, merged_sha256 : str
        Before and after the merge; of a new tensor the first is empty.
    terms : list of dict
        What was added, see `loraformat.ops.merge.plan.DeltaTerm`.
    rows : list of int
        Of mode "rows".
    """

    mode: str
    dtype: str
    shape: tuple[int, ...]
    sha256: str
    merged_sha256: str
    terms: list[dict[str, Any]] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class UndoRecord:
    """The data needed to undo a merge, besides the adapters and the merged model.

    Attributes
    ----------
    created_by : str
    tile_elements : int
        Elements of a tile.
    adapters : list of AdapterRecord
    tensors : dict of str to UndoTensor
        By name; of those that the merge changed.
    unchanged : dict of str to str
        SHA-256 of the others.
    config : str or None
        ``config.json`` of the original.
    """

    created_by: str
    tile_elements: int
    adapters: list[AdapterRecord]
    tensors: dict[str, UndoTensor]
    unchanged: dict[str, str]
    config: str | None = None


def encode_record(record: UndoRecord, parts: Mapping[str, int]) -> tuple[bytes, list[Entry]]:
    """Return the header of a record's file, and where its parts lie.

    `parts` are the bytes of each stored part, by name, in order.
    """
    entries, position = [], 0
    for name, nbytes in parts.items():
        entries.append(Entry(name, "U8", (nbytes,), position, position + nbytes))
        position += nbytes
    text = json.dumps({"version": VERSION, "formula": FORMULA, **asdict(record)})
    return encode_header(entries, {METADATA_KEY: text}), entries


def part_names(name: str) -> tuple[str, str, str, str]:
    """Return the names of a tensor's stored parts.

    The residual, all tiles' one after the other; int64 positions of -0.0; float32 gains;
    int64 lengths of the tiles' residuals.
    """
    return f"{name}.residual", f"{name}.zeros", f"{name}.gains", f"{name}.lengths"
