"""Carried tokenizer files of a model or an adapter."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cached_property
from os import PathLike
from typing import Any

from loraformat.errors import InputError, printable
from loraformat.model.checkpoint import CarriedFile
from loraformat.storage.foreign_json import ForeignJsonError, loads

__all__ = ["CarriedTokenizer"]

_TEMPLATE = re.compile(r"(?:additional_chat_templates|chat_templates)/([A-Za-z0-9_-]{1,64})\.jinja")
_SPECIAL = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


class CarriedTokenizer:
    """The tokenizer in a model's carried files.

    Parameters
    ----------
    files : iterable of CarriedFile
        Others than a tokenizer's are not looked at.
    path : path-like
        Where they lie, for messages.

    Examples
    --------
    >>> file = CarriedFile("tokenizer_config.json", 24, lambda: b'{"chat_template": "hi"}')
    >>> CarriedTokenizer([file], "my-model").chat_templates
    {'default': 'hi'}
    """

    def __init__(self, files: Iterable[CarriedFile], path: str | PathLike[str]) -> None:
        self.path = path
        self._files = {file.path: file for file in files}

    def has(self, name: str) -> bool:
        """Tell whether a file exists."""
        return name in self._files

    def size(self, name: str) -> int:
        """Return a file's size in bytes."""
        return self._files[name].nbytes

    def bytes(self, name: str) -> bytes:
        """Return a file's bytes."""
        return self._files[name].read()

    def json(self, name: str) -> dict[str, Any]:
        """Return the object in a JSON file; empty if the file is missing.

        Raises `InputError` if it is not JSON, or not an object.
        """
        if name not in self._files:
            return {}
        try:
            found = loads(self.bytes(name))
        except ForeignJsonError as error:
            raise self.wrong(name, f"is not JSON: {error}") from None
        if not isinstance(found, dict):
            raise self.wrong(name, "is not a JSON object")
        return found

    def wrong(self, name: str, what: str) -> InputError:
        """Return an error about one of the files."""
        return InputError(f"{name} {what}", path=self.path)

    @cached_property
    def tokenizer(self) -> dict[str, Any]:
        """``tokenizer.json``."""
        return self.json("tokenizer.json")

    @cached_property
    def config(self) -> dict[str, Any]:
        """``tokenizer_config.json``."""
        return self.json("tokenizer_config.json")

    @cached_property
    def special(self) -> dict[str, str]:
        """The texts of special tokens by kind: ``bos``, ``eos``, ``unk``, ..."""
        found = {}
        for values in (self.json("special_tokens_map.json"), self.config):
            for kind in _SPECIAL:
                text = values.get(f"{kind}_token")
                if isinstance(text, dict):
                    text = text.get("content")
                if isinstance(text, str):
                    found[kind] = text
        return found

    @cached_property
    def stops(self) -> list[int]:
        """Stop tokens in ``generation_config.json``; empty if it has none."""
        value = self.json("generation_config.json").get("eos_token_id")
        return [n for n in (value if isinstance(value, list) else [value]) if type(n) is int]

    @cached_property
    def chat_templates(self) -> dict[str, str]:
        """Chat templates by name, as text: they are never rendered."""
        found: dict[str, str] = {}
        given = self.config.get("chat_template")
        if isinstance(given, str):
            found["default"] = given
        for one in given if isinstance(given, list) else []:
            if isinstance(one, dict) and isinstance(one.get("template"), str):
                found[str(one.get("name"))] = one["template"]
        other = self.json("chat_template.json").get("chat_template")
        if isinstance(other, str):
            found["default"] = other
        for name in self._files:
            if name == "chat_template.jinja":
                found["default"] = self._text(name)
            elif match := _TEMPLATE.fullmatch(name):
                found[match[1]] = self._text(name)
        return found

    def _text(self, name: str) -> str:
        try:
            return self.bytes(name).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.wrong(printable(name), f"is not UTF-8 ({error.reason})") from None
