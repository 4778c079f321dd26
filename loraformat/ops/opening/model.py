"""Opening models by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from loraformat import plugins
from loraformat.bundle.manifest_rules import MAX_MANIFEST_BYTES, parse_manifest
from loraformat.bundle.reader import Bundle, open_bundle
from loraformat.card.carried import keep_user_text
from loraformat.errors import UnsupportedError, UsageError
from loraformat.hub import Source, resolve
from loraformat.model.checkpoint import Checkpoint
from loraformat.model.config_json import MAX_CONFIG_BYTES, split
from loraformat.plugins import Converter, ReadOptions
from loraformat.storage.reserved_names import MANIFEST_NAME
from loraformat.storage.safe_directory import SafeDirectory

__all__ = [
    "fingerprint_of",
    "open_model",
    "open_source",
    "open_with",
    "origin_fingerprint",
    "read_model",
]


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
    converter = plugins.sniff(path, "base")
    if converter.kind != "base" or converter.read is None:
        raise UnsupportedError(
            f"is an adapter ({converter.name}), not a model"
            if converter.kind == "adapter"
            else f"{converter.name} can be written, not read",
            path=path,
        )
    return converter.read(path)


def open_with(
    source: Source,
    reader: Converter,
    *,
    dtype: str | None = None,
    exact: bool = False,
    config: str | Path | None = None,
    allow_pickle: bool = False,
) -> Checkpoint:
    """Open a base from which another is made, without a card that was written of itself alone.

    What a format without ``config.json``, or of other numbers, leaves open is said here.

    Parameters
    ----------
    source : Source
    reader : Converter
    dtype : str, optional
        safetensors name of the type to which numbers of the format's own types are rounded.
    exact : bool
        Without it: rather a wider type than one that does not hold them.
    config : str or Path, optional
        The model's ``config.json``.
    allow_pickle : bool
        Read a pickle, with a loader that makes nothing but tensors.

    Raises
    ------
    UsageError
        If the format cannot be read, or has a config of its own.
    """
    if reader.read is None:
        raise UsageError(f"format {reader.name!r} can be written but not read")
    if reader.read_with is None:
        if config is not None:
            raise UsageError(f"--config is for GGUF files, and {source.path} is {reader.name}")
        return _with_own_words(reader.read(source.path))
    raw = None
    if config is not None:
        place = Path(config)
        raw, _ = split(SafeDirectory(place.parent).read(place.name, MAX_CONFIG_BYTES), place)
    model = _with_own_words(
        reader.read_with(source.path, ReadOptions(raw, dtype, exact, allow_pickle))
    )
    return model if config is None else replace(model, sources=(*model.sources, Path(config)))


def read_model(reader: Converter, path: Path, *, allow_pickle: bool) -> Checkpoint:
    """Open a path by the converter that knows it; a pickle only if that is allowed.

    Parameters
    ----------
    reader : Converter
        Of base models.
    path : Path
    allow_pickle : bool
    """
    if allow_pickle and reader.read_with is not None:
        return reader.read_with(path, ReadOptions(allow_pickle=True))
    assert reader.read is not None
    return reader.read(path)


def _with_own_words(model: Checkpoint) -> Checkpoint:
    return replace(model, files=keep_user_text(model.files))


def fingerprint_of(model: Checkpoint) -> str | None:
    """Return the fingerprint of an open bundle; None for every other format."""
    if model.provenance.format != "loraformat":
        return None
    raw = SafeDirectory(model.path).read(MANIFEST_NAME, MAX_MANIFEST_BYTES)
    return parse_manifest(raw, model.path / MANIFEST_NAME).fingerprint


def origin_fingerprint(model: Checkpoint) -> str | None:
    """Return the fingerprint of an open bundle, or of the bundle that a model says it came of.

    Its numbers may be rounded otherwise: it tells whether an adapter was made for such a base,
    and names none.
    """
    return fingerprint_of(model) or model.provenance.fingerprint
