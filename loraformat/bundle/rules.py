"""Consistency rules between a bundle's files: manifest, shards, index, config.

What one file must be by itself is checked where it is parsed (`loraformat.tensors.header`,
`loraformat.bundle.manifest_rules`, `loraformat.nf4.quant_state`,
`loraformat.shards.stored_tensors`). Here they are held against each other. Rules ``B..``,
``L03`` to ``L06``, ``N08`` and ``V02`` of
``spec/loraformat-1.1.md``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from loraformat.bundle.manifest import Manifest, has_segments
from loraformat.errors import FormatError, InputError, printable
from loraformat.families.tensor_names import layer_of
from loraformat.model import config_json
from loraformat.model.checkpoint import LazyTensor, NF4Tensor
from loraformat.model.nf4_parts import SEGMENT_METHOD
from loraformat.model.written import FileRecord, ShardRecord
from loraformat.shards import index_json
from loraformat.shards.layout import TAIL_SUFFIXES
from loraformat.storage.safe_directory import SafeDirectory
from loraformat.storage.safe_paths import MANIFEST_NAME
from loraformat.tensors.mapped import MappedFile

__all__ = [
    "check_files",
    "check_index",
    "check_layout",
    "check_size",
    "check_tensors",
    "open_shards",
    "read_bounded",
    "split_config",
]


def read_bounded(folder: SafeDirectory, name: str, limit: int, rule: str) -> bytes:
    """Return a file's bytes; raise under the given rule if it is too long."""
    if (size := folder.size(name)) > limit:
        problem = f"{size} bytes long, wanted at most {limit}"
        raise FormatError(rule, problem, path=folder.path / name)
    return folder.read(name, limit)


def open_shards(
    folder: SafeDirectory, manifest: Manifest, opened: contextlib.ExitStack
) -> tuple[MappedFile, ...]:
    """Open all shards, which the stack closes, and check rules B02, B05 and V02."""
    _check_shard_files(folder, manifest)
    return tuple(_open_shard(folder, record, opened) for record in manifest.shards)


def _check_shard_files(folder: SafeDirectory, manifest: Manifest) -> None:
    listed = {shard.file for shard in manifest.shards}
    present = {path.name for path in folder.path.glob("*.safetensors")}
    if missing := sorted(listed - present):
        raise FormatError(
            "B02", f"shard {missing[0]} is missing", path=folder.path, hint="download it again"
        )
    if extra := sorted(present - listed):
        raise FormatError(
            "B02",
            f"{printable(extra[0])} is not a shard of this bundle",
            path=folder.path,
            hint="move it elsewhere: other programs would load it",
        )


def _open_shard(
    folder: SafeDirectory, record: ShardRecord, opened: contextlib.ExitStack
) -> MappedFile:
    shard = MappedFile(folder, record.file, profile=True)
    opened.callback(shard.close)
    if shard.nbytes != record.bytes:
        raise FormatError(
            "B05",
            f"{shard.nbytes} bytes long, the manifest says {record.bytes}",
            path=shard.path,
            hint="the download is incomplete; download it again",
        )
    if shard.header_sha256 != record.header_sha256:
        raise FormatError(
            "V02", "its header is not the one the manifest describes", path=shard.path
        )
    return shard


def check_tensors(
    folder: SafeDirectory, manifest: Manifest, tensors: Mapping[str, LazyTensor]
) -> None:
    """N08: the manifest and the shards describe the same weights."""
    records, path = manifest.tensors, folder.path / MANIFEST_NAME
    for name in records.keys() ^ tensors.keys():
        where = "in no shard" if name in records else "not in the manifest"
        raise FormatError("N08", f"tensor {printable(name)} is {where}", path=path)
    for name, record in records.items():
        tensor = tensors[name]
        described: tuple[Any, ...] = (record.encoding, record.dtype, record.shape)
        found: tuple[Any, ...] = ("dense", tensor.dtype, tensor.shape)
        if isinstance(tensor, NF4Tensor):
            described += (record.block_size, record.double_quant, record.segments)
            found = ("nf4", *found[1:], tensor.block_size, tensor.double_quant, tensor.segments)
        if described != found:
            raise FormatError(
                "N08",
                f"tensor {printable(name)} is {_words(described)} in the manifest, "
                f"{_words(found)} in its shard",
                path=path,
            )


def _words(facts: tuple[Any, ...]) -> str:
    return " ".join(str(list(fact) if isinstance(fact, tuple) else fact) for fact in facts)


def _stored_owners(shard: MappedFile) -> Iterator[tuple[str, bool]]:
    """Yield the name of each stored tensor, and whether it is in the tail."""
    states = {
        name.removesuffix(TAIL_SUFFIXES[-1])
        for name in shard.header.entries
        if name.endswith(TAIL_SUFFIXES[-1])
    }
    for name in shard.header.entries:
        tail = any(name.endswith(s) and name.removesuffix(s) in states for s in TAIL_SUFFIXES)
        yield name, tail


def check_layout(
    folder: SafeDirectory,
    manifest: Manifest,
    shards: Sequence[MappedFile],
    tensors: Mapping[str, LazyTensor],
) -> None:
    """L03 to L06: the tail is last, layers are contiguous, ascending and not needlessly split."""
    last: dict[str, int] = {}
    homes: dict[tuple[str, int], list[int]] = {}
    for number, shard in enumerate(shards):
        owners = list(_stored_owners(shard))
        for (before, in_tail), (name, tail) in pairwise([("", False), *owners]):
            if in_tail and not tail:
                raise FormatError(
                    "L03",
                    f"tensor {printable(name)} lies behind the maps and quant states",
                    path=shard.path,
                )
            layer = layer_of(name)
            if layer is not None and not tail and layer != layer_of(before):
                _enter_layer(layer, number, last, homes, shard.path)
    _check_splits(folder, manifest, tensors, homes)


def _enter_layer(
    layer: tuple[str, int],
    shard: int,
    last: dict[str, int],
    homes: dict[tuple[str, int], list[int]],
    path: Path,
) -> None:
    stem, number = layer
    shards = homes.setdefault(layer, [])
    if shard in shards:
        raise FormatError(
            "L04", f"layer {printable(stem)}.{number} is not one contiguous range", path=path
        )
    if number < last.get(stem, 0):
        raise FormatError(
            "L05", f"layer {printable(stem)}.{number} lies behind layer {last[stem]}", path=path
        )
    last[stem] = number
    shards.append(shard)


def _check_splits(
    folder: SafeDirectory,
    manifest: Manifest,
    tensors: Mapping[str, LazyTensor],
    homes: Mapping[tuple[str, int], list[int]],
) -> None:
    split = {layer for layer, shards in homes.items() if len(shards) > 1}
    if not split:
        return
    sizes = dict.fromkeys(split, 0)
    for tensor in tensors.values():
        layer = layer_of(tensor.name)
        if layer in sizes:
            sizes[layer] += tensor.nbytes
    for (stem, number), size in sizes.items():
        if size <= manifest.shard_limit:
            raise FormatError(
                "L06",
                f"layer {printable(stem)}.{number} of {size} bytes lies in several shards, "
                f"though the limit is {manifest.shard_limit}",
                path=folder.path,
            )


def check_index(folder: SafeDirectory, shards: Sequence[MappedFile]) -> None:
    """B03, B04, B07: the index, which peers read, says what the headers say."""
    path = folder.path / index_json.INDEX_NAME
    if not folder.has(index_json.INDEX_NAME):
        raise FormatError(
            "B03", "is missing; transformers cannot open the bundle without it", path=path
        )
    raw = read_bounded(folder, index_json.INDEX_NAME, index_json.MAX_INDEX_BYTES, "B03")
    weight_map, total = index_json.parse_index(raw, path, strict=True)
    stored = {name: shard.path.name for shard in shards for name in shard.header.entries}
    for name in stored.keys() | weight_map.keys():
        if stored.get(name) != weight_map.get(name):
            raise FormatError(
                "B04",
                f"puts tensor {printable(name)} into {printable(weight_map.get(name))}, "
                f"it lies in {stored.get(name)}",
                path=path,
            )
    size = sum(entry.nbytes for shard in shards for entry in shard.header.entries.values())
    if total != size:
        raise FormatError(
            "B07", f"gives total_size {total}, the tensors take {size} bytes", path=path
        )


def check_files(folder: SafeDirectory, manifest: Manifest) -> None:
    """B05, B08: carried files and adapters exist and have the recorded sizes."""
    config = config_json.CONFIG_NAME
    if config not in manifest.files and folder.has(config):
        raise FormatError(
            "B08",
            "is not listed in the manifest, although other programs would use it",
            path=folder.path / config,
        )
    for path, record in manifest.listed_files.items():
        hint = "it was edited after the bundle was written; convert again"
        check_size(folder, path, record, hint=hint)


def check_size(
    folder: SafeDirectory, name: str, record: FileRecord, *, hint: str | None = None
) -> None:
    """B05: a file is there, and has the size that the manifest records."""
    path = folder.path / name
    if not folder.has(name):
        raise FormatError("B05", "is missing or is not a regular file", path=path)
    if (size := folder.size(name)) != record.bytes:
        problem = f"{size} bytes long, the manifest says {record.bytes}"
        raise FormatError("B05", problem, path=path, hint=hint)


def split_config(
    folder: SafeDirectory, manifest: Manifest, tensors: Mapping[str, LazyTensor]
) -> tuple[bytes | None, dict[str, Any] | None]:
    """B06: ``config.json`` states the quantization of the shards."""
    name = config_json.CONFIG_NAME
    if name not in manifest.files:
        return None, None
    path = folder.path / name
    try:
        config, quantization = config_json.split(
            folder.read(name, config_json.MAX_CONFIG_BYTES), path
        )
    except InputError as error:
        raise FormatError("B06", error.problem, path=path) from None
    quantized = [t for t in tensors.values() if isinstance(t, NF4Tensor)]
    cut = has_segments(manifest.tensors)
    method, in_4bit = (SEGMENT_METHOD, None) if cut else ("bitsandbytes", True)
    wanted = {"quant_method": method, "load_in_4bit": in_4bit, "bnb_4bit_quant_type": "nf4"}
    found = {key: (quantization or {}).get(key) for key in wanted}
    if quantized and (found != wanted or found["load_in_4bit"] is not in_4bit):
        raise FormatError(
            "B06", f"quantization_config does not say {method} NF4, as the shards do", path=path
        )
    if not quantized and quantization is not None:
        raise FormatError("B06", "has a quantization_config, but no tensor is quantized", path=path)
    return config, quantization
