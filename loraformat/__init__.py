"""loraformat: base weights in NF4 and LoRA deltas, converted, verified and streamed.

The names below are loaded on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from loraformat.version import __version__

if TYPE_CHECKING:
    from loraformat.errors import LoraFormatError as LoraFormatError
    from loraformat.ops.check.fix import fix as fix
    from loraformat.ops.check.verb import check as check
    from loraformat.ops.combine.options import CombineOptions as CombineOptions
    from loraformat.ops.combine.verb import combine as combine
    from loraformat.ops.convert import convert as convert
    from loraformat.ops.describe import describe as describe
    from loraformat.ops.extract.options import ExtractOptions as ExtractOptions
    from loraformat.ops.extract.verb import extract as extract
    from loraformat.ops.merge.verb import merge as merge
    from loraformat.ops.open import open_source as open
    from loraformat.ops.reduce import Reduction as Reduction
    from loraformat.ops.reduce import reduce as reduce
    from loraformat.ops.remove import remove as remove
    from loraformat.ops.sharing.pull import pull as pull
    from loraformat.ops.sharing.push import push as push
    from loraformat.ops.spectrum import spectrum as spectrum
    from loraformat.ops.unmerge.verb import unmerge as unmerge
    from loraformat.ops.verify import verify as verify

_HOMES = {
    "CombineOptions": ("loraformat.ops.combine.options", "CombineOptions"),
    "ExtractOptions": ("loraformat.ops.extract.options", "ExtractOptions"),
    "LoraFormatError": ("loraformat.errors", "LoraFormatError"),
    "Reduction": ("loraformat.ops.reduce", "Reduction"),
    "check": ("loraformat.ops.check.verb", "check"),
    "combine": ("loraformat.ops.combine.verb", "combine"),
    "convert": ("loraformat.ops.convert", "convert"),
    "describe": ("loraformat.ops.describe", "describe"),
    "extract": ("loraformat.ops.extract.verb", "extract"),
    "fix": ("loraformat.ops.check.fix", "fix"),
    "merge": ("loraformat.ops.merge.verb", "merge"),
    "open": ("loraformat.ops.open", "open_source"),
    "pull": ("loraformat.ops.sharing.pull", "pull"),
    "push": ("loraformat.ops.sharing.push", "push"),
    "reduce": ("loraformat.ops.reduce", "reduce"),
    "remove": ("loraformat.ops.remove", "remove"),
    "spectrum": ("loraformat.ops.spectrum", "spectrum"),
    "unmerge": ("loraformat.ops.unmerge.verb", "unmerge"),
    "verify": ("loraformat.ops.verify", "verify"),
}

__all__ = [
    "CombineOptions",
    "ExtractOptions",
    "LoraFormatError",
    "Reduction",
    "__version__",
    "check",
    "combine",
    "convert",
    "describe",
    "extract",
    "fix",
    "merge",
    "open",
    "pull",
    "push",
    "reduce",
    "remove",
    "spectrum",
    "unmerge",
    "verify",
]


def __getattr__(name: str) -> Any:
    try:
        module, attribute = _HOMES[name]
    except KeyError:
        raise AttributeError(f"module 'loraformat' has no attribute {name!r}") from None
    return getattr(import_module(module), attribute)
