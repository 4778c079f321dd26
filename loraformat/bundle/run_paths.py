"""Paths of a training run's directory, next to the adapter."""

from __future__ import annotations

import os
from pathlib import Path

from loraformat.bundle.update import parse_bundle_slot

__all__ = ["CURVE_NAME", "run_place"]

#: The picture of the loss in it.
CURVE_NAME = "loss.png"


def run_place(output: Path) -> Path:
    """Return the run directory of an adapter.

    ``OUTPUT.run``; of an adapter in a bundle ``BUNDLE.NAME.run``, beside the bundle.

    Examples
    --------
    >>> run_place(Path("out/mine")).name
    'mine.run'
    """
    place = parse_bundle_slot(output)
    if place is not None:
        return place.bundle.with_name(f"{place.bundle.name}.{place.name}.run")
    absolute = Path(os.path.abspath(output))
    return absolute.with_name(absolute.name + ".run")
