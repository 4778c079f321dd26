"""loraformat: base weights in NF4 and LoRA deltas, converted, verified and streamed.

The names below are loaded on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from loraformat.version import __version__

if TYPE_CHECKING:
    from loraformat.errors import LoraFormatError as LoraFormatError
    from loraformat.ops.convert import convert as convert
    from loraformat.ops.describe import describe as describe
    from loraformat.ops.merge import merge as merge
    from loraformat.ops.open import open_source as open
    from loraformat.ops.remove import remove as remove
    from loraformat.ops.unmerge import unmerge as unmerge
    from loraformat.ops.verify import verify as verify

_HOMES = {
    "LoraFormatError": ("loraformat.errors", "LoraFormatError"),
    "convert": ("loraformat.ops.convert", "convert"),
    "describe": ("loraformat.ops.describe", "describe"),
    "merge": ("loraformat.ops.merge", "merge"),
    "open": ("loraformat.ops.open", "open_source"),
    "remove": ("loraformat.ops.remove", "remove"),
    "unmerge": ("loraformat.ops.unmerge", "unmerge"),
    "verify": ("loraformat.ops.verify", "verify"),
}

__all__ = [
    "LoraFormatError",
    "__version__",
    "convert",
    "describe",
    "merge",
    "open",
    "remove",
    "unmerge",
    "verify",
]


def __getattr__(name: str) -> Any:
    try:
        module, attribute = _HOMES[name]
    except KeyError:
        raise AttributeError(f"module 'loraformat' has no attribute {name!r}") from None
    return getattr(import_module(module), attribute)
