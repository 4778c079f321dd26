"""Held-out texts: of the kind the small model was trained on, and of each adapter's kind."""

from __future__ import annotations

from pathlib import Path

from loraformat.demo import HELDOUT

__all__ = ["KINDS", "heldout", "heldout_path"]

#: ``library``: Python source, as the model was trained on. ``manual`` and ``tests``: what the
#: adapters of these names were trained on. No model or adapter has seen these texts.
KINDS = ("library", "manual", "tests")

#: Of heldout.txt, its first three modules: enough to compare models, and quick.
_LIBRARY_BYTES = 30_273


def heldout_path(kind: str) -> Path:
    """Return the file of a kind of text.

    Parameters
    ----------
    kind : str
        One of `KINDS`.
    """
    return HELDOUT if kind == "library" else HELDOUT.with_name(f"heldout_{kind}.txt")


def heldout(kind: str) -> str:
    """Read the held-out text of a kind.

    Parameters
    ----------
    kind : str
        One of `KINDS`.

    Examples
    --------
    >>> heldout("manual").splitlines()[0]
    'The "assert" statement'
    """
    raw = heldout_path(kind).read_bytes()
    return (raw[:_LIBRARY_BYTES] if kind == "library" else raw).decode("utf-8")
