"""Opening and copying adapters of any format."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from loraformat import plugins
from loraformat.bundle.manifest import Manifest
from loraformat.bundle.update import parse_bundle_slot, read_manifest
from loraformat.errors import FileChangedError, UnsupportedError
from loraformat.hub import Source, resolve
from loraformat.model.adapter import Adapter
from loraformat.model.checkpoint import Checkpoint
from loraformat.model.foreign_adapters import adapters_below
from loraformat.model.written import FileRecord
from loraformat.plugins import AdapterFormat, AdapterReadOptions, Format
from loraformat.storage.atomic_output import AtomicOutput
from loraformat.storage.durable import write_all
from loraformat.storage.safe_directory import SafeDirectory

__all__ = ["copy_adapter", "listing", "open_adapter"]

_COPIED_AT_ONCE = 4 << 20


def open_adapter(
    path: str | Path | Source | Adapter,
    *,
    reader: Format | None = None,
    base: Checkpoint | None = None,
    allow_pickle: bool = False,
    conditional: bool = False,
    inspect: bool = False,
) -> Adapter:
    """Open an adapter in any format.

    Parameters
    ----------
    path : str, Path, Source or Adapter
        A local path, ``BUNDLE/adapters/NAME`` too, or a Hub id. An adapter that is open stays
        the caller's: closing what is returned does nothing.
    reader : Format, optional
        By default the one that recognises it.
    base : Checkpoint, optional
        The base it will be applied to: names and orientation are held against it.
    allow_pickle : bool
        Read a pickled file, too, with a loader that makes nothing but tensors.
    conditional, inspect : bool
        See `AdapterReadOptions`.

    Returns
    -------
    Adapter
        A context manager; its ``deltas`` are read on demand.

    Raises
    ------
    LoraFormatError
        If it is no adapter, damaged, or more than a low-rank delta.
    """
    if isinstance(path, Adapter):
        return replace(path, close=lambda: None)
    found = path if isinstance(path, Source) else resolve(path, pickles=allow_pickle)
    path = found.path
    reader = reader or plugins.sniff(path, AdapterFormat)
    if not isinstance(reader, AdapterFormat):
        below = adapters_below(path)
        raise UnsupportedError(
            f"is a {reader.kind} ({reader.name}), not an adapter",
            path=path,
            hint=f"an adapter of it is {below[-1]}" if below else None,
        )
    return reader.read(path, AdapterReadOptions(base, allow_pickle, conditional, inspect))


def listing(path: Path) -> tuple[Manifest | None, Mapping[str, FileRecord] | None]:
    """Return the manifest of the bundle that an adapter lies in, and the files that it lists."""
    slot = parse_bundle_slot(path)
    if slot is None:
        return None, None
    manifest = read_manifest(slot.bundle)
    return manifest, manifest.adapters.get(slot.name)


def copy_adapter(adapter: Adapter, output: AtomicOutput) -> None:
    """Copy an adapter's own files, byte for byte; committing the output is the caller's.

    Raises
    ------
    UnsupportedError
        If a copy would not be the adapter (`Adapter.verbatim`): it was changed in memory,
        or read from a pickle.
    FileChangedError
        If a file changed since the adapter was opened.
    """
    if not adapter.verbatim:
        raise UnsupportedError(
            "cannot be copied byte for byte: it was read from a pickle or modified since",
            path=adapter.path,
            hint="convert it instead",
        )
    source = SafeDirectory(adapter.path)
    for file in adapter.files:
        left = file.nbytes
        with (
            os.fdopen(source.open(file.path), "rb") as stream,
            output.create(file.path) as copy,
        ):
            while piece := stream.read(_COPIED_AT_ONCE):
                left -= len(piece)
                write_all(copy, piece)
        if left:
            raise FileChangedError("changed while it was being copied", path=adapter.path)
