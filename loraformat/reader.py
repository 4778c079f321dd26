"""Opening a bundle: every structural rule, before anything looks at a weight.

`open_bundle` reads the manifest, the index and the headers, checks them against each
other and against the sizes of the files, and returns a lazy `Checkpoint` on mapped
shards. What only hashes can find (changed content) is left to `loraformat.verify`.
Rules ``B..``, ``L..``, ``N..`` of ``spec/loraformat-1.0.md``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from loraformat import config_json, index_json
from loraformat.checkpoint import (
    CarriedFile,
    Checkpoint,
    LazyTensor,
    NF4Parts,
    NF4Tensor,
    Provenance,
    nf4_digest,
)
from loraformat.errors import FormatError, InputError, printable
from loraformat.folder import Folder
from loraformat.layout import TAIL_SUFFIXES, layer_of
from loraformat.manifest import (
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    FileRecord,
    Manifest,
    parse_manifest,
)
from loraformat.mapped import MappedFile
from loraformat.stored import collect

__all__ = ["Bundle", "is_bundle", "load_verified", "open_bundle"]


class Bundle:
    """An open bundle.

    Attributes
    ----------
    folder : Folder
    manifest : Manifest
    shards : tuple of MappedFile
    tensors : dict of str to LazyTensor
        As they lie in the shards, in the order of their bytes.
    checkpoint : Checkpoint
        The base for conversions: its tensors compare their SHA-256 when they are loaded.
    """

    def __init__(self, folder: Folder, manifest: Manifest, shards: tuple[MappedFile, ...]) -> None:
        self.folder = folder
        self.manifest = manifest
        self.shards = shards
        records = manifest.tensors
        self.tensors: dict[str, LazyTensor] = collect(
            shards,
            transposed=lambda name: name in records and records[name].transposed,
            errors={name: record.relative_rms_error for name, record in records.items()},
        )
        _check_tensors(self)
        _check_layout(self)
        _check_index(self)
        _check_files(self)
        self.checkpoint = self._checkpoint()

    def _checkpoint(self) -> Checkpoint:
        config, quantization = _config(self)
        files = tuple(
            CarriedFile(
                path, record.bytes, partial(self.folder.read, path, record.bytes)
            )
            for path, record in self.manifest.files.items()
            if path != config_json.CONFIG_NAME
        )
        names = [MANIFEST_NAME, index_json.INDEX_NAME, *(shard.path.name for shard in self.shards)]
        return Checkpoint(
            path=self.folder.path,
            provenance=Provenance("loraformat", **_origin(self.manifest.source)),
            tensors={
                name: _verifying(self.tensors[name], record.sha256, self.folder.path)
                for name, record in self.manifest.tensors.items()
            },
            config=config,
            quantization_config=quantization,
            files=files,
            sources=tuple(self.folder.path / name for name in [*names, *self.manifest.files]),
            left_behind=tuple(f"adapter {name}" for name in self.manifest.adapters),
            close=self.close,
        )

    def close(self) -> None:
        """Unmap the shards; raises `FileChangedError` if one changed meanwhile."""
        with contextlib.ExitStack() as stack:
            for shard in self.shards:
                stack.callback(shard.close)

    def __enter__(self) -> Bundle:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def is_bundle(path: Path) -> bool:
    """Tell whether a directory claims to be a bundle."""
    return (path / MANIFEST_NAME).is_file()


def open_bundle(path: Path) -> Bundle:
    """Open a bundle and check its structure.

    Parameters
    ----------
    path : Path
        The directory.

    Raises
    ------
    FormatError
        Naming the first broken rule.
    InputError
        If a file cannot be read.
    """
    folder = Folder(path)
    if not folder.has(MANIFEST_NAME):
        raise FormatError("B01", f"no {MANIFEST_NAME}", path=path, hint="this is not a bundle")
    raw = _read_json(folder, MANIFEST_NAME, MAX_MANIFEST_BYTES, "M01")
    manifest = parse_manifest(raw, path / MANIFEST_NAME)
    _check_shard_files(folder, manifest)
    with contextlib.ExitStack() as opened:
        shards = tuple(
            _open_shard(folder, manifest, number, opened) for number in range(len(manifest.shards))
        )
        bundle = Bundle(folder, manifest, shards)
        opened.pop_all()
        return bundle


def _read_json(folder: Folder, name: str, limit: int, rule: str) -> bytes:
    if (size := folder.size(name)) > limit:
        problem = f"{size} bytes long, wanted at most {limit}"
        raise FormatError(rule, problem, path=folder.path / name)
    return folder.read(name, limit)


def load_verified(tensor: LazyTensor, wanted: str, path: Path) -> memoryview | NF4Parts:
    """Load a tensor and compare its content with its SHA-256.

    Parameters
    ----------
    tensor : LazyTensor
    wanted : str
        64 hexadecimal digits; of an NF4 weight see `loraformat.checkpoint.nf4_digest`.
    path : Path
        For messages.

    Raises
    ------
    FormatError
        V01, or what loading raises.
    """
    loaded = tensor.load()
    found = nf4_digest(loaded) if isinstance(loaded, NF4Parts) else sha256(loaded).hexdigest()
    if found != wanted:
        raise FormatError(
            "V01",
            f"tensor {printable(tensor.name)} has SHA-256 {found}, wanted {wanted}",
            path=path,
            hint="its content was changed or damaged; fetch it again",
        )
    return loaded


def _verifying(tensor: LazyTensor, wanted: str, path: Path) -> LazyTensor:
    load: Any = partial(load_verified, tensor, wanted, path)
    return replace(tensor, load=load)


def _check_shard_files(folder: Folder, manifest: Manifest) -> None:
    listed = {shard.file for shard in manifest.shards}
    present = {path.name for path in folder.path.glob("*.safetensors")}
    if missing := sorted(listed - present):
        raise FormatError(
            "B02", f"shard {missing[0]} is missing", path=folder.path, hint="fetch it again"
        )
    if extra := sorted(present - listed):
        raise FormatError(
            "B02",
            f"{printable(extra[0])} is no shard of this bundle",
            path=folder.path,
            hint="move it away: other programs would load it",
        )


def _open_shard(
    folder: Folder, manifest: Manifest, number: int, opened: contextlib.ExitStack
) -> MappedFile:
    record = manifest.shards[number]
    shard = MappedFile(folder, record.file, profile=True)
    opened.callback(shard.close)
    if shard.nbytes != record.bytes:
        raise FormatError(
            "B05",
            f"{shard.nbytes} bytes long, the manifest says {record.bytes}",
            path=shard.path,
            hint="the download is incomplete; fetch it again",
        )
    if shard.header_sha256 != record.header_sha256:
        raise FormatError(
            "V02", "its header is not the one the manifest describes", path=shard.path
        )
    return shard


def _origin(source: Mapping[str, str]) -> dict[str, Any]:
    return {key: source[key] for key in ("repo", "revision") if key in source}


def _check_tensors(bundle: Bundle) -> None:
    """N08: the manifest and the shards describe the same weights."""
    records, path = bundle.manifest.tensors, bundle.folder.path / MANIFEST_NAME
    for name in records.keys() ^ bundle.tensors.keys():
        where = "in no shard" if name in records else "not in the manifest"
        raise FormatError("N08", f"tensor {printable(name)} is {where}", path=path)
    for name, record in records.items():
        tensor = bundle.tensors[name]
        described: tuple[Any, ...] = (record.encoding, record.dtype, record.shape)
        found: tuple[Any, ...] = ("dense", tensor.dtype, tensor.shape)
        if isinstance(tensor, NF4Tensor):
            described += (record.block_size, record.double_quant)
            found = ("nf4", *found[1:], tensor.block_size, tensor.double_quant)
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
    """Yield each stored tensor's name and whether it belongs to the tail."""
    states = {
        name.removesuffix(TAIL_SUFFIXES[-1])
        for name in shard.header.entries
        if name.endswith(TAIL_SUFFIXES[-1])
    }
    for name in shard.header.entries:
        tail = any(name.endswith(s) and name.removesuffix(s) in states for s in TAIL_SUFFIXES)
        yield name, tail


def _check_layout(bundle: Bundle) -> None:
    """L03 to L06: the tail is last, layers are contiguous, ascending and not needlessly split."""
    last: dict[str, int] = {}
    homes: dict[tuple[str, int], list[int]] = {}
    for number, shard in enumerate(bundle.shards):
        previous: tuple[str, int] | None = None
        seen_tail = False
        for name, tail in _stored_owners(shard):
            if seen_tail and not tail:
                raise FormatError(
                    "L03",
                    f"tensor {printable(name)} lies behind the maps and quant states",
                    path=shard.path,
                )
            seen_tail = tail
            layer = layer_of(name)
            if tail or layer is None:
                previous = None
                continue
            if layer != previous:
                _enter_layer(layer, number, last, homes, shard.path)
            previous = layer
    _check_splits(bundle, homes)


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


def _check_splits(bundle: Bundle, homes: Mapping[tuple[str, int], list[int]]) -> None:
    split = {layer for layer, shards in homes.items() if len(shards) > 1}
    if not split:
        return
    sizes = dict.fromkeys(split, 0)
    for tensor in bundle.tensors.values():
        layer = layer_of(tensor.name)
        if layer in sizes:
            sizes[layer] += tensor.nbytes
    for (stem, number), size in sizes.items():
        if size <= bundle.manifest.shard_limit:
            raise FormatError(
                "L06",
                f"layer {printable(stem)}.{number} of {size} bytes lies in several shards, "
                f"though the limit is {bundle.manifest.shard_limit}",
                path=bundle.folder.path,
            )


def _check_index(bundle: Bundle) -> None:
    """B03, B04, B07: the index, which peers read, says what the headers say."""
    path = bundle.folder.path / index_json.INDEX_NAME
    if not bundle.folder.has(index_json.INDEX_NAME):
        raise FormatError(
            "B03", "is missing; transformers cannot open the bundle without it", path=path
        )
    raw = _read_json(bundle.folder, index_json.INDEX_NAME, index_json.MAX_INDEX_BYTES, "B03")
    weight_map, total = index_json.parse_index(raw, path)
    stored = {name: shard.path.name for shard in bundle.shards for name in shard.header.entries}
    for name in stored.keys() | weight_map.keys():
        if stored.get(name) != weight_map.get(name):
            raise FormatError(
                "B04",
                f"puts tensor {printable(name)} into {printable(weight_map.get(name))}, "
                f"it lies in {stored.get(name)}",
                path=path,
            )
    size = sum(entry.nbytes for shard in bundle.shards for entry in shard.header.entries.values())
    if total != size:
        raise FormatError(
            "B07", f"gives total_size {total}, the tensors take {size} bytes", path=path
        )


def _check_files(bundle: Bundle) -> None:
    """B05, B08: carried files and adapters are there, as long as the manifest says."""
    config = config_json.CONFIG_NAME
    if config not in bundle.manifest.files and bundle.folder.has(config):
        raise FormatError(
            "B08",
            "is not listed in the manifest, though other programs would obey it",
            path=bundle.folder.path / config,
        )
    for path, record in _all_files(bundle.manifest):
        if not bundle.folder.has(path):
            raise FormatError(
                "B05", "is missing or is not a regular file", path=bundle.folder.path / path
            )
        size = bundle.folder.size(path)
        if size != record.bytes:
            raise FormatError(
                "B05",
                f"{size} bytes long, the manifest says {record.bytes}",
                path=bundle.folder.path / path,
                hint="it was edited after the bundle was written; convert again",
            )


def _all_files(manifest: Manifest) -> Iterator[tuple[str, FileRecord]]:
    yield from manifest.files.items()
    for name, files in manifest.adapters.items():
        for path, record in files.items():
            yield f"adapters/{name}/{path}", record


def _config(bundle: Bundle) -> tuple[bytes | None, dict[str, Any] | None]:
    """B06: ``config.json`` tells peers the quantization that the shards have."""
    name = config_json.CONFIG_NAME
    if name not in bundle.manifest.files:
        return None, None
    path = bundle.folder.path / name
    try:
        config, quantization = config_json.split(
            bundle.folder.read(name, config_json.MAX_CONFIG_BYTES), path
        )
    except InputError as error:
        raise FormatError("B06", error.problem, path=path) from None
    quantized = [t for t in bundle.tensors.values() if isinstance(t, NF4Tensor)]
    wanted = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    found = {key: (quantization or {}).get(key) for key in wanted}
    if quantized and (found != wanted or found["load_in_4bit"] is not True):
        raise FormatError(
            "B06", "quantization_config does not say bitsandbytes NF4, as the shards do", path=path
        )
    if not quantized and quantization is not None:
        raise FormatError("B06", "has a quantization_config, but no tensor is quantized", path=path)
    return config, quantization
