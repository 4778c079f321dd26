"""Opening models by name."""

from __future__ import annotations

from pathlib import Path

from loraformat import plugins
from loraformat.checkpoint import Checkpoint
from loraformat.errors import UnsupportedError
from loraformat.folder import Folder
from loraformat.hub import resolve
from loraformat.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, parse_manifest
from loraformat.reader import Bundle, open_bundle

__all__ = ["fingerprint_of", "open_model", "open_source"]


def open_source(source: str | Path) -> Bundle:
    """Open a bundle and check its structure; no weight is read.

    Parameters
    ----------
    source : str or Path
        A directory, or ``org/name[@revision]`` on the Hub.

    Returns
    -------
    Bundle
        A context manager; leaving it unmaps the shards.

    Raises
    ------
    FormatError
        If it breaks a rule of the specification.
    """
    return open_bundle(resolve(source).path)


def open_model(source: str | Path) -> Checkpoint:
    """Open a base model in any format that its content tells.

    Parameters
    ----------
    source : str or Path
        A local path, or ``org/name[@revision]`` on the Hub.

    Returns
    -------
    Checkpoint
        A context manager.

    Raises
    ------
    UnsupportedError
        If it is an adapter, or a format that can only be written.
    """
    path = resolve(source).path
    converter = plugins.sniff(path)
    if converter.kind != "base" or converter.read is None:
        raise UnsupportedError(
            f"is an adapter ({converter.name}), not a model"
            if converter.kind == "adapter"
            else f"{converter.name} can be written, not read",
            path=path,
        )
    return converter.read(path)


def fingerprint_of(model: Checkpoint) -> str | None:
    """Return the fingerprint of an open bundle; None for every other format."""
    if model.provenance.format != "loraformat":
        return None
    raw = Folder(model.path).read(MANIFEST_NAME, MAX_MANIFEST_BYTES)
    return parse_manifest(raw, model.path / MANIFEST_NAME).fingerprint
