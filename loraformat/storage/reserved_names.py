"""Reserved file names in model directories."""

from __future__ import annotations

__all__ = ["CARD_NAME", "MANIFEST_NAME"]

#: Makes a directory a bundle.
MANIFEST_NAME = "loraformat.json"
#: The model card: carried but not listed in the manifest, so that it can be edited on the Hub.
CARD_NAME = "README.md"
