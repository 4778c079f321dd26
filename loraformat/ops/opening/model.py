"""Opening models by path or Hub id."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from loraformat import plugins
from loraformat.bundle import reader as bundle_reader
from loraformat.bundle.manifest_rules import MAX_MANIFEST_BYTES, parse_manifest
from loraformat.card.carried import keep_user_text
from loraformat.errors import InputError, UnsupportedError, UsageError, printable
from loraformat.hub import Source, resolve
from loraformat.model.adapter import Adapter
from loraformat.model.base_match import BaseMatch
from loraformat.model.checkpoint import Checkpoint
from loraformat.model.config_json import MAX_CONFIG_BYTES, split
from loraformat.plugins import BaseFormat, Format, ReadOptions
from loraformat.storage.safe_directory import SafeDirectory
from loraformat.storage.safe_paths import MANIFEST_NAME

__all__ = [
    "check_base",
    "compare_base",
    "difference_of",
    "fingerprint_of",
    "open_bundle",
    "open_model",
    "origin_fingerprint",
    "with_origin",
    "without_generated_card",
]

_INSTEAD = "use the base that it was trained on"


def open_bundle(path: str | Path) -> bundle_reader.Bundle:
    """Open a bundle and check its structure; no weight is read.

    Parameters
    ----------
    path : str or Path
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
    return bundle_reader.open_bundle(resolve(path).path)


def open_model(
    path: str | Path | Source,
    *,
    reader: Format | None = None,
    config: str | Path | None = None,
    dtype: str | None = None,
    exact: bool = False,
    allow_pickle: bool = False,
) -> Checkpoint:
    """Open a base model in any format; no weight is read until it is asked for.

    Parameters
    ----------
    path : str, Path or Source
        A local path, or ``org/name[@revision]`` on the Hub.
    reader : Format, optional
        By default the one that recognises it.
    config : str or Path, optional
        The model's ``config.json``, where the format has none.
    dtype : str, optional
        safetensors name of the type to which numbers of the format's own types are rounded.
    exact : bool
        Without ``dtype``: rather a wider type than one that does not hold them.
    allow_pickle : bool
        Read a pickle, with a loader that makes nothing but tensors.

    Returns
    -------
    Checkpoint
        A context manager; its ``tensors`` are read on demand.

    Raises
    ------
    UnsupportedError
        If it is an adapter.
    UsageError
        If ``config`` is given for a format that has its own.
    """
    found = path if isinstance(path, Source) else resolve(path, pickles=allow_pickle)
    path = found.path
    reader = reader or plugins.sniff(path, BaseFormat)
    if not isinstance(reader, BaseFormat):
        raise UnsupportedError(f"is an adapter ({reader.name}), not a model", path=path)
    if config is not None and not reader.takes_config:
        raise UsageError(f"--config is for GGUF files, and {path} is {reader.name}")
    raw = None
    if config is not None:
        place = Path(config)
        raw, _ = split(SafeDirectory(place.parent).read(place.name, MAX_CONFIG_BYTES), place)
    model = reader.read(path, ReadOptions(raw, dtype, exact, allow_pickle))
    return model if config is None else replace(model, sources=(*model.sources, Path(config)))


def without_generated_card(model: Checkpoint) -> Checkpoint:
    """Return a source model with its card reduced to the user text."""
    return replace(model, files=keep_user_text(model.files))


def with_origin(model: Checkpoint, source: Source) -> Checkpoint:
    """Return a model whose provenance has its Hub repository and commit."""
    if source.repo is None:
        return model
    origin = replace(model.provenance, repo=source.repo, revision=source.revision)
    return replace(model, provenance=origin)


def fingerprint_of(model: Checkpoint) -> str | None:
    """Return the fingerprint of an open bundle; None for every other format."""
    if model.provenance.format != "loraformat":
        return None
    raw = SafeDirectory(model.path).read(MANIFEST_NAME, MAX_MANIFEST_BYTES)
    return parse_manifest(raw, model.path / MANIFEST_NAME).fingerprint


def origin_fingerprint(model: Checkpoint) -> str | None:
    """Return the fingerprint of an open bundle, or of the bundle a model was made from.

    Its numbers may be rounded otherwise: it tells whether an adapter was made for such a base,
    and names none.
    """
    return fingerprint_of(model) or model.provenance.fingerprint


def compare_base(adapter: Adapter, base: Checkpoint) -> BaseMatch:
    """Compare the base that an adapter records with an open one."""
    own = fingerprint_of(base)
    here = own or base.provenance.fingerprint
    return BaseMatch(adapter.base_fingerprint, here, descends=own is None)


def check_base(
    adapter: Adapter,
    base: Checkpoint,
    *,
    allowed: bool,
    instead: str = _INSTEAD,
) -> list[str]:
    """Refuse an adapter of another base, unless ``allowed``, and say what a user should know.

    ``instead`` is what else can be done about it.

    Raises
    ------
    InputError
        If both have a fingerprint, or the base says of which bundle it was made, and not the same.
    """
    match, form = compare_base(adapter, base), base.provenance.format
    if match.made_for is None:
        named = f" {printable(adapter.base_model)}" if adapter.base_model else ""
        problem = f"records its base{named} but no base fingerprint; only shapes were compared"
    elif match.relation == "unknown":
        made_for = printable(match.made_for)
        problem = f"was made for the base {made_for}, and a {form} model has no fingerprint to "
        problem += "compare"
    elif match.relation == "descends":
        problem = f"was made for the bundle {printable(match.made_for)}, of which this {form} file "
        problem += "was made; it was trained on the values in the bundle"
    elif match.relation == "same":
        return []
    else:
        problem = difference_of(adapter, match, allowed, instead)
    return [f"{adapter.path}: {problem}"]


def difference_of(
    adapter: Adapter, match: BaseMatch, allowed: bool, instead: str = _INSTEAD
) -> str:
    """Say for which other base an adapter was made, or refuse it if that is not ``allowed``."""
    if not allowed:
        hint = f"{instead}, or override with --allow-base-mismatch"
        raise InputError(match.difference, path=adapter.path, hint=hint)
    return f"{match.difference}; it may not work on this base"
