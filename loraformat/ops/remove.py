"""``loraformat remove``: removal of an adapter from a bundle."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from loraformat.bundle.update import parse_bundle_slot, remove_adapter
from loraformat.errors import UsageError
from loraformat.model.report import Report

__all__ = ["RemovalReport", "remove"]


@dataclass(frozen=True, slots=True, repr=False)
class RemovalReport(Report):
    """Report of ``remove``.

    Attributes
    ----------
    bundle : str
    adapter : str
        Its name in the bundle.
    """

    _shared: ClassVar[tuple[str, ...]] = ()

    bundle: str
    adapter: str


def remove(path: str | Path) -> RemovalReport:
    """Remove an adapter from a bundle.

    `path` is ``BUNDLE/adapters/NAME``. The adapter is removed from the manifest first, then its
    files are deleted. Nothing else in the bundle changes.

    Parameters
    ----------
    path : str or Path
        ``BUNDLE/adapters/NAME``.

    Returns
    -------
    RemovalReport

    Raises
    ------
    UsageError
        If the path is no place in a bundle.
    InputError
        If the manifest does not list it.
    """
    place = parse_bundle_slot(Path(path))
    if place is None:
        raise UsageError(f"{path} is not an adapter in a bundle, wanted BUNDLE/adapters/NAME")
    remove_adapter(place)
    return RemovalReport(str(place.bundle), place.name)
