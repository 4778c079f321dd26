"""Undo records built byte by byte for the test vectors, sound or spoiled in one place.

This shares no code with the package, so that a mistake in one is not a mistake in both.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import undo_arithmetic as arithmetic
from undo_arithmetic import Delta, Term
from vector_nf4 import f32, pack

Json = dict[str, Any]
Tensor = tuple[str, list[int], bytes]
SIZE = {"F32": 4, "F16": 2, "BF16": 2, "I64": 8, "U8": 1}


def numbers(count: int, seed: int, scale: float = 1.0) -> list[float]:
    """Return float32 numbers that look drawn from a bell curve, the same on every machine."""
    state, made = seed * 2654435761 % 2**32, []
    for _ in range(count):
        total = 0
        for _ in range(4):
            state = (state * 1664525 + 1013904223) % 2**32
            total += (state >> 12) - 2**19
        made.append(f32(total / 2**20 * scale))
    return made


def table(rows: int, columns: int, seed: int, scale: float = 1.0) -> list[list[float]]:
    """Return `numbers` in rows."""
    flat = numbers(rows * columns, seed, scale)
    return [flat[i * columns : (i + 1) * columns] for i in range(rows)]


@dataclass
class Change:
    """What a merge does to one tensor: adds terms, or puts something else in its place."""

    mode: str = "interval"
    terms: list[Term] = field(default_factory=list)
    dtype: str | None = None
    rows: list[int] = field(default_factory=list)
    merged: Tensor | None = None


@dataclass
class Draft:
    """A merge before its bytes; a hook of each kind may spoil one thing on the way."""

    original: dict[str, Tensor] = field(default_factory=dict)
    changes: dict[str, Change] = field(default_factory=dict)
    adapters: list[dict[str, Delta]] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    tile_elements: int = 24
    config: str | None = None
    members: Json = field(default_factory=dict)
    #: Spoils the bytes of a tile before it joins the others.
    tile: Callable[[bytes], bytes] | None = None
    #: Spoils the record's object, its text, its parts, the merged tensors, the adapters' files.
    record: Callable[[Json], Any] | None = None
    text: Callable[[str], str] | None = None
    parts: Callable[[dict[str, Tensor]], Any] | None = None
    metadata: Callable[[dict[str, str]], Any] | None = None
    merged: Callable[[dict[str, Tensor]], Any] | None = None
    adapter: Callable[[dict[str, Tensor]], Any] | None = None

    def weight(self, name: str, dtype: str, shape: list[int], values: list[float]) -> Draft:
        """Add a tensor of the original."""
        self.original[name] = (dtype, shape, pack(values, dtype))
        return self


def safetensors(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """Return a safetensors file."""
    header: Json = {"__metadata__": metadata} if metadata else {}
    position, data = 0, b""
    for name, (dtype, shape, piece) in tensors.items():
        span = [position, position + len(piece)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": span}
        position, data = span[1], data + piece
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


def _flat(nested: Any) -> list[float]:
    return [x for part in nested for x in _flat(part)] if isinstance(nested, list) else [nested]


def _shape(nested: Any) -> list[int]:
    return [len(nested), *_shape(nested[0])] if isinstance(nested, list) else []


def adapter_tensors(deltas: dict[str, Delta]) -> dict[str, Tensor]:
    """Return the tensors of an adapter's file."""
    made = {}
    for target, delta in deltas.items():
        for leaf in ("a", "b", "magnitude", "bias"):
            nested = getattr(delta, leaf)
            if nested is not None:
                data = pack(_flat(nested), delta.dtype)
                made[f"{target}.{leaf}"] = (delta.dtype, _shape(nested), data)
    return made


def adapter_digest(deltas: dict[str, Delta]) -> str:
    """Return the digest of section 4."""
    digest, tensors = sha256(), adapter_tensors(deltas)
    for target, delta in sorted(deltas.items()):
        digest.update(f"{target}\0{delta.scaling!r}\0{delta.orientation}\0".encode())
        for leaf in ("a", "b", "magnitude", "bias"):
            dtype, shape, data = tensors.get(f"{target}.{leaf}", ("none", [], b""))
            known = f"{dtype}\0" + (f"[{', '.join(map(str, shape))}]\0" if shape else "")
            digest.update(known.encode() + data)
    return digest.hexdigest()


def _interval(draft: Draft, name: str, change: Change) -> tuple[Tensor, dict[str, Tensor]]:
    """Merge one tensor; return the result and its parts."""
    source, shape, data = draft.original[name]
    dtype = change.dtype or source
    stack = shape[0] if len(shape) == 3 else 1
    rows, columns = ([1, 1, *shape])[-2:]
    step = max(1, draft.tile_elements // max(columns, 1))
    weights, merged, tiles, gains = arithmetic.values(data, source), [], [], []
    for block in range(stack):
        terms = [term for term in change.terms if term.block == block]
        deltas, by_feature, turned = [[0.0] * columns] * rows, None, False
        if terms:
            deltas, by_feature, turned = arithmetic.delta_of(terms, draft.adapters)
            gains += [gain for term in terms for gain in term.gains]
        for start in range(0, rows, step):
            w, d, g = [], [], []
            for row in range(start, min(start + step, rows)):
                at = (block * rows + row) * columns
                w += weights[at : at + columns]
                d += deltas[row]
                for column in range(columns):
                    known = by_feature
                    g.append(None if known is None else known[column if turned else row])
            m = [arithmetic.merged_value(*each, dtype) for each in zip(w, d, g, strict=True)]
            merged += m
            tiles.append(arithmetic.tile_code(w, m, d, g, source, dtype))
    if draft.tile:
        tiles = list(map(draft.tile, tiles))
    zeros = [i for i, x in enumerate(weights) if x == 0 and math.copysign(1, x) < 0]
    parts = {
        "residual": b"".join(tiles),
        "zeros": b"".join(i.to_bytes(8, "little") for i in zeros),
        "gains": pack(gains, "F32"),
        "lengths": b"".join(len(tile).to_bytes(8, "little") for tile in tiles),
    }
    return (dtype, shape, pack(merged, dtype)), _parts(name, parts)


def _parts(name: str, parts: dict[str, bytes]) -> dict[str, Tensor]:
    return {f"{name}.{k}": ("U8", [len(data)], data) for k, data in parts.items() if data}


def _entry(draft: Draft, name: str, change: Change) -> tuple[Tensor, dict[str, Tensor], Json]:
    """Return a merged tensor, its parts and its entry in the record."""
    dtype, shape, data = draft.original.get(name, ("", [], b""))
    merged: Tensor | None = change.merged
    parts: dict[str, Tensor] = {}
    if change.mode == "interval":
        merged, parts = _interval(draft, name, change)
    elif change.mode == "raw":
        parts = _parts(name, {"residual": data})
    elif change.mode == "rows":
        width = len(data) // shape[0]
        kept = [data[row * width : (row + 1) * width] for row in change.rows]
        parts = _parts(name, {"residual": b"".join(kept)})
    assert merged is not None
    entry = {
        "mode": change.mode,
        "dtype": dtype,
        "shape": shape,
        "sha256": sha256(data).hexdigest() if change.mode != "new" else "",
        "merged_sha256": sha256(merged[2]).hexdigest(),
        "terms": [term.json() for term in change.terms],
        "rows": change.rows,
    }
    return merged, parts, entry


def build(draft: Draft) -> dict[str, bytes]:
    """Return the files of a vector."""
    merged: dict[str, Tensor] = {}
    parts: dict[str, Tensor] = {}
    entries: Json = {}
    for name in {**draft.original, **draft.changes}:
        if name in draft.changes:
            merged[name], own, entries[name] = _entry(draft, name, draft.changes[name])
            parts |= own
        else:
            merged[name] = draft.original[name]
    record: Json = {
        "version": "1.0",
        "formula": "fixed-point-1",
        "created_by": "tools/make_vectors.py",
        "tile_elements": draft.tile_elements,
        "adapters": [
            {"path": f"adapter-{i}.safetensors", "sha256": adapter_digest(deltas),
             "weight": draft.weights[i] if draft.weights else 1.0}
            for i, deltas in enumerate(draft.adapters)
        ],
        "tensors": entries,
        "unchanged": {
            name: sha256(merged[name][2]).hexdigest() for name in merged if name not in entries
        },
        "config": draft.config,
        **draft.members,
    }  # fmt: skip
    for spoil, thing in ((draft.record, record), (draft.parts, parts), (draft.merged, merged)):
        if spoil:
            spoil(thing)
    text = json.dumps(record, separators=(",", ":"))
    metadata = {"loraformat.undo": draft.text(text) if draft.text else text}
    if draft.metadata:
        draft.metadata(metadata)
    files = {"undo.lfu": safetensors(parts, metadata)}
    files["merged.safetensors"] = safetensors(merged, {"format": "pt"})
    for i, deltas in enumerate(draft.adapters):
        tensors = adapter_tensors(deltas)
        if draft.adapter:
            draft.adapter(tensors)
        about = {
            target: json.dumps({"scaling": delta.scaling, "orientation": delta.orientation})
            for target, delta in deltas.items()
        }
        files[f"adapter-{i}.safetensors"] = safetensors(tensors, about)
    return files


def expected(draft: Draft) -> Json:
    """Return what a reader must restore."""
    restored = {
        name: {
            "dtype": dtype,
            "shape": shape,
            "sha256": sha256(data).hexdigest(),
            "first": data[:16].hex(),
        }
        for name, (dtype, shape, data) in draft.original.items()
    }
    return {"restored": restored, "config": draft.config}
