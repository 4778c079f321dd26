"""Removing an adapter from a bundle."""

from __future__ import annotations

from pathlib import Path

from loraformat.bundle.update import BundleSlot, parse_bundle_slot, remove_adapter
from loraformat.errors import UsageError

__all__ = ["remove"]


def remove(path: str | Path) -> BundleSlot:
    """Remove an adapter from a bundle; its base and other adapters stay as they are.

    Parameters
    ----------
    path : str or Path
        ``BUNDLE/adapters/NAME``.

    Returns
    -------
    BundleSlot
        What was removed, from where.

    Raises
    ------
    UsageError
        If the path is no place in a bundle.
    InputError
        If the manifest does not list it.
    """
    place = parse_bundle_slot(Path(path))
    if place is None:
        raise UsageError(f"{path} is no adapter in a bundle, wanted BUNDLE/adapters/NAME")
    remove_adapter(place)
    return place
