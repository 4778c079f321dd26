"""Pooling of embedding models: sentence-transformers' files and the GGUF key.

A model of sentence-transformers has its pooling in ``1_Pooling/config.json``; llama.cpp reads a
number in the metadata, which llama-server heeds unless ``--pooling`` says otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from loraformat.errors import InputError, printable
from loraformat.model.checkpoint import CarriedFile
from loraformat.storage.foreign_json import parse_object
from loraformat_converters.gguf.container.values import GGUFValue

if TYPE_CHECKING:
    from loraformat_converters.gguf.container.reader import GGUFFile

__all__ = ["pooling", "pooling_key", "without_pooling"]

_FILE = re.compile(r"\d+_Pooling/config\.json")
_DENSE = re.compile(r"\d+_Dense/config\.json")
_MOST_BYTES = 1 << 16
#: sentence-transformers' names, and llama.cpp's number.
_KINDS = {"mean_tokens": 1, "cls_token": 2, "lasttoken": 3, "mean": 1, "cls": 2}
_NAMES = {1: "mean", 2: "cls", 3: "last"}


def pooling_key(architecture: str) -> str:
    """Return the name of llama.cpp's key."""
    return f"{architecture}.pooling_type"


def pooling(
    files: Iterable[CarriedFile], architecture: str
) -> tuple[dict[str, GGUFValue], list[str]]:
    """Return the key for a model's pooling, and what llama.cpp does not do of it."""
    files = list(files)
    notes = [
        f"{printable(file.path.partition('/')[0])}, which sentence-transformers applies to the "
        "pooled vector, has no place in a GGUF file"
        for file in files
        if _DENSE.fullmatch(file.path)
    ]
    found = next((file for file in files if _FILE.fullmatch(file.path)), None)
    if found is None:
        return {}, notes
    kinds = _kinds(found)
    if len(kinds) != 1 or next(iter(kinds)) not in _KINDS:
        said = printable(", ".join(sorted(kinds)) or "nothing that is known")
        return {}, [*notes, f"{found.path} says {said}: llama.cpp pools by mean, cls or last token"]
    kind = _KINDS[kinds.pop()]
    return {pooling_key(architecture): GGUFValue.uint(kind)}, notes


def _kinds(file: CarriedFile) -> set[str]:
    """Return the kinds of pooling that a file asks for; none if it cannot be read."""
    if file.nbytes > _MOST_BYTES:
        return set()
    try:
        fields = parse_object(file.read(), file.path)
    except InputError:
        return set()
    named = fields.get("pooling_mode")
    flags = {
        key.removeprefix("pooling_mode_")
        for key, value in fields.items()
        if key.startswith("pooling_mode_") and value is True
    }
    return flags or ({named} if isinstance(named, str) else set())


def without_pooling(gguf: GGUFFile) -> list[str]:
    """Return what of a file's pooling has no place in a directory, as a sentence."""
    value = gguf.metadata.get(pooling_key(gguf.architecture))
    kind = _NAMES.get(value.value) if value is not None and type(value.value) is int else None
    if kind is None:
        return []
    return [f"its pooling ({kind}), which sentence-transformers keeps in 1_Pooling/config.json"]
