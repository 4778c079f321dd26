"""Chat templates in GGUF metadata."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from loraformat.model.checkpoint import CarriedFile
from loraformat_converters.gguf.container.values import GGUFValue
from loraformat_converters.gguf.tokenizers.sources import Sources

if TYPE_CHECKING:
    from loraformat_converters.gguf.container.reader import GGUFFile

__all__ = ["template_files", "template_keys"]

_KEY = "tokenizer.chat_template"
_NAMES = "tokenizer.chat_templates"
_SAFE = re.compile(r"[A-Za-z0-9_-]{1,64}")


def template_keys(sources: Sources) -> dict[str, GGUFValue]:
    """Return the keys: the default template, and others by name."""
    keys = {}
    others = []
    for name, text in sources.chat_templates.items():
        if name == "default":
            keys[_KEY] = GGUFValue.text(text)
        elif _SAFE.fullmatch(name):
            others.append(name)
            keys[f"{_KEY}.{name}"] = GGUFValue.text(text)
    if others:
        keys[_NAMES] = GGUFValue.texts(sorted(others))
    return keys


def template_files(gguf: GGUFFile) -> list[CarriedFile]:
    """Return ``chat_template.jinja``, and the other templates where transformers looks."""
    found = []
    if _KEY in gguf.metadata:
        found.append(_carried("chat_template.jinja", gguf.text(_KEY)))
    for key in gguf.metadata:
        name = key.removeprefix(f"{_KEY}.")
        if name != key and _SAFE.fullmatch(name):
            found.append(_carried(f"additional_chat_templates/{name}.jinja", gguf.text(key)))
    return found


def _carried(path: str, text: str) -> CarriedFile:
    return CarriedFile.of(path, text.encode())
