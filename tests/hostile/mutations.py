"""Random damage to a bundle, from single bits to well-formed lies."""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random
from typing import Any

from bundles import INDEX, MANIFEST, STATE, join, repair, split

Files = dict[str, bytes]

_VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    7,
    32,
    64,
    255,
    256,
    4096,
    2**31,
    2**48,
    2**53,
    2**63,
    2**64 - 1,
    -(2**63),
    10**19,
    0.5,
    -0.0,
    1e308,
    5e-324,
    "",
    "nf4",
    "fp4",
    "dense",
    "float32",
    "float16",
    "F16",
    "BF16",
    "U8",
    "I8",
    "../x",
    "/etc/passwd",
    "a\x00b",
    "\ud800",
    "é",
    "x" * 600,
    "0" * 64,
    "1.1",
    "2.0",
    [],
    {},
    [[]],
    [0],
    [2, 64],
    [64, 2],
    {"must_understand": False},
    {"must_understand": True},
]
_LITERALS = [
    b"NaN",
    b"-Infinity",
    b"1e999",
    b"9" * 30,
    b"[" * 60 + b"]" * 60,
    b"01",
    b"'x'",
    b"",
    b"}",
]


def mutate(files: Files, rng: Random) -> tuple[str, Files, bool]:
    """Return a description, the damaged files, and whether digests and lengths were repaired."""
    target = rng.choice([_raw, _raw, _document, _document, _header, _header, _state, _data, _moved])
    what, changed = target(files, rng)
    if rng.random() < 0.3:
        again, changed = rng.choice([_raw, _document])(changed, rng)
        what = f"{what}; {again}"
    if rng.random() < 0.6:
        try:
            return f"{what}; repaired", repair(changed), True
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
            pass
    return what, changed, False


def _raw(files: Files, rng: Random) -> tuple[str, Files]:
    name = rng.choice(sorted(files))
    data = bytearray(files[name])
    position = rng.randrange(len(data) + 1)
    # Most of a shard is padding and tables; the first bytes and the last are the interesting ones.
    if rng.random() < 0.3:
        position = min(position, rng.randrange(64))
    other, length = rng.randrange(len(data) + 1), rng.choice([1, 1, 2, 8, 64, 1000])
    kind = rng.choice(["flip", "byte", "cut", "insert", "delete", "copy"])
    if kind == "flip" and position < len(data):
        data[position] ^= 1 << rng.randrange(8)
    elif kind == "byte" and position < len(data):
        data[position] = rng.choice(b'\x00\xff"{}[]:,\\ \n0919aA')
    elif kind == "cut":
        del data[position:]
    elif kind == "insert":
        data[position:position] = rng.randbytes(length)
    elif kind == "delete":
        del data[position : position + length]
    elif kind == "copy":
        data[position : position + length] = data[other : other + length]
    return f"{kind} {name} at {position}, {other}, {length}", {**files, name: bytes(data)}


def _document(files: Files, rng: Random) -> tuple[str, Files]:
    documents = sorted(name for name in files if name.endswith(".json"))
    name = rng.choice([MANIFEST] * 4 + [INDEX] * 2 + documents)
    try:
        tree = json.loads(files[name])
    except ValueError:
        return f"{name} is no JSON any more", files
    what, data = spoil(tree, rng)
    return f"{name}: {what}", {**files, name: data}


def _header(files: Files, rng: Random) -> tuple[str, Files]:
    name = rng.choice(sorted(name for name in files if name.endswith(".safetensors")))
    header, data = split(files[name])
    what, raw = spoil(header, rng)
    alignment = 8 if "/" in name or rng.random() < 0.05 else 4096
    raw = raw.ljust(-(-(len(raw) + 8) // alignment) * alignment - 8)
    return f"header of {name}: {what}", {**files, name: len(raw).to_bytes(8, "little") + raw + data}


def _state(files: Files, rng: Random) -> tuple[str, Files]:
    found = _quantized(files)
    if found is None:
        return _header(files, rng)
    name, header, data, owner = found
    begin, end = header[owner]["data_offsets"]
    what, raw = spoil(json.loads(data[begin:end]), rng)
    return f"state of {owner}: {what}", _replaced(files, name, header, data, owner, raw)


def _data(files: Files, rng: Random) -> tuple[str, Files]:
    name = rng.choice(sorted(n for n in files if n.endswith(".safetensors") and "/" not in n))
    header, data = split(files[name])
    spoiled = bytearray(data)
    for _ in range(rng.choice([1, 1, 3, 20])):
        if spoiled:
            spoiled[rng.randrange(len(spoiled))] = rng.randrange(256)
    return f"data of {name}", {**files, name: join(header, bytes(spoiled))}


def _moved(files: Files, rng: Random) -> tuple[str, Files]:
    """Open a gap of some bytes in a shard's data, or let two tensors share theirs."""
    name = rng.choice(sorted(n for n in files if n.endswith(".safetensors") and "/" not in n))
    header, data = split(files[name])
    entries = [entry for key, entry in header.items() if key != "__metadata__"]
    at, gap = rng.choice(entries)["data_offsets"][rng.randrange(2)], rng.choice([-16, -1, 1, 8, 64])
    for entry in entries:
        if entry["data_offsets"][0] >= at:
            entry["data_offsets"] = [max(0, offset + gap) for offset in entry["data_offsets"]]
    moved = data[:at] + bytes(max(gap, 0)) + data[at - min(gap, 0) :]
    return f"gap of {gap} at {at} in {name}", {**files, name: join(header, moved)}


def _quantized(files: Files) -> tuple[str, dict[str, Any], bytes, str] | None:
    for name in sorted(files):
        if name.endswith(".safetensors") and "/" not in name:
            header, data = split(files[name])
            for tensor in header:
                if tensor.endswith(STATE):
                    return name, header, data, tensor
    return None


def _replaced(
    files: Files, name: str, header: dict[str, Any], data: bytes, tensor: str, raw: bytes
) -> Files:
    begin, end = header[tensor]["data_offsets"]
    longer = len(raw) - (end - begin)
    for entry in header.values():
        if "data_offsets" in entry and entry["data_offsets"][0] >= end:
            entry["data_offsets"] = [offset + longer for offset in entry["data_offsets"]]
    header[tensor] |= {"shape": [len(raw)], "data_offsets": [begin, begin + len(raw)]}
    return {**files, name: join(header, data[:begin] + raw + data[end:])}


def spoil(tree: Any, rng: Random) -> tuple[str, bytes]:
    """Change one node of a JSON tree and write it again."""
    path, parent = _pick(tree, rng)
    if parent is None:
        return "whole document", json.dumps(rng.choice(_VALUES)).encode()
    key = path[-1]
    change = rng.choice(
        [_delete, _replace, _replace, _nudge, _nudge, _rename, _reorder, _add, _literal, _twice]
    )
    return f"{change.__name__} {path}", change(tree, parent, key, rng)


def _pick(tree: Any, rng: Random) -> tuple[list[Any], Any]:
    path: list[Any] = []
    parent, node = None, tree
    while isinstance(node, dict | list) and node and (not path or rng.random() < 0.8):
        key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
        path.append(key)
        parent, node = node, node[key]
    return path, parent


def _dump(tree: Any) -> bytes:
    return json.dumps(tree).encode()


def _delete(tree: Any, parent: Any, key: Any, rng: Random) -> bytes:
    del parent[key]
    return _dump(tree)


def _replace(tree: Any, parent: Any, key: Any, rng: Random) -> bytes:
    parent[key] = rng.choice(_VALUES)
    return _dump(tree)


def _nudge(tree: Any, parent: Any, key: Any, rng: Random) -> bytes:
    value = parent[key]
    if isinstance(value, bool):
        parent[key] = not value
    elif isinstance(value, int | float):
        parent[key] = rng.choice(
            [
                value + 1,
                value - 1,
                value * 2,
                -value,
                float(value),
                value ^ 1 if isinstance(value, int) else value / 2,
            ]
        )
    elif isinstance(value, str):
        parent[key] = rng.choice(
            [value[:-1], f"{value} ", value.upper(), value[::-1], f"{value}\n"]
        )
    elif isinstance(value, list):
        parent[key] = rng.choice([value[:-1], value + value[-1:], value[::-1]])
    else:
        parent[key] = [value]
    return _dump(tree)


def _rename(tree: Any, parent: Any, key: Any, rng: Random) -> bytes:
    if not isinstance(parent, dict):
        return _replace(tree, parent, key, rng)
    new = rng.choice(
        [f"{key}x", key.upper(), "", "__metadata__", f"../{key}", f"{key}.weight", key[::-1]]
    )
    items = [(new if name == key else name, value) for name, value in parent.items()]
    parent.clear()
    parent.update(items)
    return _dump(tree)


def _reorder(tree: Any, parent: Any, key: Any, rng: Random) -> bytes:
    if isinstance(parent, dict):
        items = list(parent.items())
        rng.shuffle(items)
        parent.clear()
        parent.update(items)
    else:
        rng.shuffle(parent)
    return _dump(tree)


def _add(tree: Any, parent: Any, key: Any, rng: Random) -> bytes:
    if isinstance(parent, dict):
        parent[rng.choice(["x", "extra", f"{key}2", "config.json", "must_understand"])] = (
            rng.choice([parent[key], *_VALUES])
        )
    else:
        parent.insert(rng.randrange(len(parent) + 1), rng.choice([parent[0], *_VALUES]))
    return _dump(tree)


def _literal(tree: Any, parent: Any, key: Any, rng: Random) -> bytes:
    parent[key] = "@@literal@@"
    return _dump(tree).replace(b'"@@literal@@"', rng.choice(_LITERALS))


def _twice(tree: Any, parent: Any, key: Any, rng: Random) -> bytes:
    if not isinstance(parent, dict):
        return _replace(tree, parent, key, rng)
    value = rng.choice([parent[key], *_VALUES])
    parent["@@twice@@"] = value
    return _dump(tree).replace(b'"@@twice@@"', json.dumps(key).encode())


Target = Callable[[Files, Random], tuple[str, Files]]
