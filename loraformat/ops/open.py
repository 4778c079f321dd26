"""Opening a bundle by name."""

from __future__ import annotations

from pathlib import Path

from loraformat.hub import resolve
from loraformat.reader import Bundle, open_bundle

__all__ = ["open_source"]


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
