"""Opening a bundle, with validation of its structure before any weight is read.

`open_bundle` reads the manifest, the index and the headers, checks them against each
other and against the sizes of the files, and returns a lazy `Checkpoint` on mapped
shards. What only hashes can find (changed content) is left to `loraformat.bundle.integrity`.
The rules between files are in `loraformat.bundle.rules`.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from loraformat.bundle.manifest import Manifest
from loraformat.bundle.manifest_rules import MAX_MANIFEST_BYTES, parse_manifest
from loraformat.bundle.rules import (
    check_files,
    check_index,
    check_layout,
    check_tensors,
    open_shards,
    read_bounded,
    split_config,
)
from loraformat.errors import FormatError, printable
from loraformat.model import config_json
from loraformat.model.checkpoint import CarriedFile, Checkpoint, LazyTensor, Provenance
from loraformat.model.nf4_parts import NF4Parts, content_digest
from loraformat.model.quantization_history import from_extension
from loraformat.shards import index_json
from loraformat.shards.stored_tensors import collect
from loraformat.storage.safe_directory import SafeDirectory
from loraformat.storage.safe_paths import CARD_NAME, MANIFEST_NAME
from loraformat.tensors.mapped import MappedFile

__all__ = ["Bundle", "is_bundle", "load_verified", "open_bundle"]


class Bundle:
    """An open bundle.

    Attributes
    ----------
    folder : SafeDirectory
    manifest : Manifest
    shards : tuple of MappedFile
    tensors : dict of str to LazyTensor
        As they lie in the shards, in the order of their bytes.
    checkpoint : Checkpoint
        The base for conversions: its tensors compare their SHA-256 when they are loaded.
    """

    def __init__(
        self, folder: SafeDirectory, manifest: Manifest, shards: tuple[MappedFile, ...]
    ) -> None:
        self.folder = folder
        self.manifest = manifest
        self.shards = shards
        records = manifest.tensors
        self.tensors: dict[str, LazyTensor] = collect(
            shards,
            transposed=lambda name: name in records and records[name].transposed,
            errors={name: record.relative_rms_error for name, record in records.items()},
        )
        check_tensors(folder, manifest, self.tensors)
        check_layout(folder, manifest, shards, self.tensors)
        check_index(folder, shards)
        check_files(folder, manifest)
        self.checkpoint = self._checkpoint()

    def _checkpoint(self) -> Checkpoint:
        config, quantization = split_config(self.folder, self.manifest, self.tensors)
        carried = [path for path in self.manifest.files if path != config_json.CONFIG_NAME]
        if CARD_NAME not in carried and self.folder.has(CARD_NAME):
            carried.append(CARD_NAME)
        sizes = {path: self.folder.size(path) for path in carried}
        shards = [shard.path.name for shard in self.shards]
        names = [MANIFEST_NAME, index_json.INDEX_NAME, *shards, *self.manifest.files, *carried]
        return Checkpoint(
            path=self.folder.path,
            provenance=Provenance(
                "loraformat",
                self.manifest.source.get("repo"),
                self.manifest.source.get("revision"),
                quantized=from_extension(self.manifest.extensions),
            ),
            tensors={
                name: _verifying(self.tensors[name], record.sha256, self.folder.path)
                for name, record in self.manifest.tensors.items()
            },
            config=config,
            quantization_config=quantization,
            files=tuple(
                CarriedFile(path, size, partial(self.folder.read, path, size))
                for path, size in sizes.items()
            ),
            sources=tuple(self.folder.path / name for name in dict.fromkeys(names)),
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

    Raises `FormatError` naming the first broken rule, or `InputError` if a file cannot be read.
    """
    folder = SafeDirectory(path)
    if not folder.has(MANIFEST_NAME):
        raise FormatError("B01", f"no {MANIFEST_NAME}", path=path, hint="this is not a bundle")
    raw = read_bounded(folder, MANIFEST_NAME, MAX_MANIFEST_BYTES, "M01")
    manifest = parse_manifest(raw, path / MANIFEST_NAME)
    with contextlib.ExitStack() as opened:
        bundle = Bundle(folder, manifest, open_shards(folder, manifest, opened))
        opened.pop_all()
        return bundle


def load_verified(tensor: LazyTensor, wanted: str, path: Path) -> memoryview | NF4Parts:
    """Load a tensor and compare the digest of its content (rule V01)."""
    loaded = tensor.load()
    found = content_digest(loaded)
    if found != wanted:
        raise FormatError(
            "V01",
            f"tensor {printable(tensor.name)} has SHA-256 {found}, wanted {wanted}",
            path=path,
            hint="its content was changed or damaged; download it again",
        )
    return loaded


def _verifying(tensor: LazyTensor, wanted: str, path: Path) -> LazyTensor:
    load: Any = partial(load_verified, tensor, wanted, path)
    return replace(tensor, load=load)
