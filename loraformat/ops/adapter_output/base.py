"""The base that an adapter is held against: a bundle, any other base, or a config alone."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from loraformat.bundle.reader import is_bundle, open_bundle
from loraformat.bundle.update import BundleSlot
from loraformat.hub import Source, resolve
from loraformat.model.checkpoint import Checkpoint, Provenance
from loraformat.model.config_json import CONFIG_NAME, MAX_CONFIG_BYTES, split
from loraformat.ops.adapter_output.form import BaseIdentity
from loraformat.ops.opening.model import open_model, with_origin
from loraformat.storage.safe_directory import SafeDirectory

__all__ = ["open_base"]


def open_base(
    stack: ExitStack, named: str | Path | None, *places: BundleSlot | None
) -> tuple[Checkpoint | None, BaseIdentity | None]:
    """Open the base that was named, else the bundle of the first place, else none.

    Parameters
    ----------
    stack : ExitStack
        Closes it.
    named : str, Path or None
        A path or a Hub id: of a bundle, of any other base, or of a directory with nothing but
        ``config.json``, which gives a checkpoint without tensors.
    *places : Place or None
        Where in bundles the adapter will lie, or lies.

    Returns
    -------
    Checkpoint or None
    BaseIdentity or None
        Of a bundle only.

    Raises
    ------
    UsageError
        If what is named is no base.
    """
    path = next((place.bundle for place in places if place is not None), None)
    source = Source(path or Path())
    if named is not None:
        source = resolve(named)
        path = source.path
    if path is None:
        return None, None
    if is_bundle(path):
        bundle = stack.enter_context(open_bundle(path))
        return bundle.checkpoint, BaseIdentity(bundle.manifest.fingerprint, bundle.manifest.source)
    if (config := _config_alone(path)) is not None:
        return with_origin(config, source), None
    return with_origin(stack.enter_context(open_model(path)), source), None


def _config_alone(path: Path) -> Checkpoint | None:
    """Return a base of which only ``config.json`` is there: a directory without weights, or it."""
    folder = path.parent if path.name == CONFIG_NAME and path.is_file() else path
    if not (folder / CONFIG_NAME).is_file() or (folder == path and any(path.glob("*.safetensors"))):
        return None
    raw, _ = split(SafeDirectory(folder).read(CONFIG_NAME, MAX_CONFIG_BYTES), folder / CONFIG_NAME)
    return Checkpoint(folder, Provenance("config"), {}, config=raw, sources=(folder / CONFIG_NAME,))
