"""``loraformat.remove``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loraformat.ops.remove import RemovalReport

__all__ = ["remove"]


def remove(path: str | Path) -> RemovalReport:
    """Remove an adapter from a bundle; nothing else in the bundle changes.

    Parameters
    ----------
    path : str or Path
        ``BUNDLE/adapters/NAME``.

    Returns
    -------
    RemovalReport

    Raises
    ------
    InputError
        If the manifest does not list it.
    """
    from loraformat.ops.remove import remove as run

    return run(path)
