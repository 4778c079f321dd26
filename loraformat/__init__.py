"""loraformat: base weights in NF4 and LoRA deltas, converted, verified and streamed.

The names below are loaded on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from loraformat.version import __version__

if TYPE_CHECKING:
    from loraformat.errors import LoraFormatError as LoraFormatError
    from loraformat.ops.check.check import check as check
    from loraformat.ops.check.fix import fix as fix
    from loraformat.ops.combine.combine import combine as combine
    from loraformat.ops.combine.options import CombineOptions as CombineOptions
    from loraformat.ops.convert.convert import convert as convert
    from loraformat.ops.extract.extract import extract as extract
    from loraformat.ops.extract.options import ExtractOptions as ExtractOptions
    from loraformat.ops.info.model import describe as describe
    from loraformat.ops.merge.merge import merge as merge
    from loraformat.ops.opening.model import open_source as open
    from loraformat.ops.pull.pull import pull as pull
    from loraformat.ops.push.push import push as push
    from loraformat.ops.reduce import Reduction as Reduction
    from loraformat.ops.reduce import reduce as reduce
    from loraformat.ops.remove import remove as remove
    from loraformat.ops.spectrum.spectrum import spectrum as spectrum
    from loraformat.ops.unmerge.unmerge import unmerge as unmerge
    from loraformat.ops.verify import verify as verify

_HOMES = {
    "CombineOptions": ("loraformat.ops.combine.options", "CombineOptions"),
    "ExtractOptions": ("loraformat.ops.extract.options", "ExtractOptions"),
    "LoraFormatError": ("loraformat.errors", "LoraFormatError"),
    "Reduction": ("loraformat.ops.reduce", "Reduction"),
    "check": ("loraformat.ops.check.check", "check"),
    "combine": ("loraformat.ops.combine.combine", "combine"),
    "convert": ("loraformat.ops.convert.convert", "convert"),
    "describe": ("loraformat.ops.info.model", "describe"),
    "extract": ("loraformat.ops.extract.extract", "extract"),
    "fix": ("loraformat.ops.check.fix", "fix"),
    "merge": ("loraformat.ops.merge.merge", "merge"),
    "open": ("loraformat.ops.opening.model", "open_source"),
    "pull": ("loraformat.ops.pull.pull", "pull"),
    "push": ("loraformat.ops.push.push", "push"),
    "reduce": ("loraformat.ops.reduce", "reduce"),
    "remove": ("loraformat.ops.remove", "remove"),
    "spectrum": ("loraformat.ops.spectrum.spectrum", "spectrum"),
    "unmerge": ("loraformat.ops.unmerge.unmerge", "unmerge"),
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
