"""The base that an adapter is compared with: a bundle, another base, or only a config."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from loraformat.bundle.reader import is_bundle, open_bundle
from loraformat.bundle.update import BundleSlot
from loraformat.hub import Source, resolve
from loraformat.model.checkpoint import Checkpoint, Provenance
from loraformat.model.config_json import CONFIG_NAME, MAX_CONFIG_BYTES, split
from loraformat.ops.opening.model import open_model, with_origin
from loraformat.storage.safe_directory import SafeDirectory

__all__ = ["AdapterBase", "open_adapter_base"]


@dataclass(frozen=True, slots=True)
class AdapterBase:
    """The base that an adapter is compared with.

    Attributes
    ----------
    checkpoint : Checkpoint
    fingerprint : str or None
        Of a bundle, whose adapter it shall be.
    source : dict of str to str
        As in that bundle's manifest.
    """

    checkpoint: Checkpoint
    fingerprint: str | None = None
    source: Mapping[str, str] = field(default_factory=dict)


def open_adapter_base(
    stack: ExitStack, named: str | Path | None, *slots: BundleSlot | None
) -> AdapterBase | None:
    """Open the named base, otherwise the bundle of the first slot, otherwise none.

    ``named`` is a path or a Hub id: of a bundle, of any other base, or of a directory with nothing
    but ``config.json``, which gives a checkpoint without tensors. The slots are where in bundles
    the adapter will lie, or lies.
    """
    path = next((slot.bundle for slot in slots if slot is not None), None)
    source = Source(path or Path())
    if named is not None:
        source = resolve(named)
        path = source.path
    if path is None:
        return None
    if is_bundle(path):
        bundle = stack.enter_context(open_bundle(path))
        return AdapterBase(bundle.checkpoint, bundle.manifest.fingerprint, bundle.manifest.source)
    if (config := _config_alone(path)) is not None:
        return AdapterBase(with_origin(config, source))
    return AdapterBase(with_origin(stack.enter_context(open_model(path)), source))


def _config_alone(path: Path) -> Checkpoint | None:
    """Return a base known only by its ``config.json``, given as a directory or the file."""
    folder = path.parent if path.name == CONFIG_NAME and path.is_file() else path
    if not (folder / CONFIG_NAME).is_file() or (folder == path and any(path.glob("*.safetensors"))):
        return None
    raw, _ = split(SafeDirectory(folder).read(CONFIG_NAME, MAX_CONFIG_BYTES), folder / CONFIG_NAME)
    return Checkpoint(folder, Provenance("config"), {}, config=raw, sources=(folder / CONFIG_NAME,))
