"""The tokenizer's files that travel with a model, read strictly and once."""

from __future__ import annotations

import re
from functools import cached_property
from typing import Any

from loraformat import strict_json
from loraformat.checkpoint import Checkpoint
from loraformat.errors import InputError, UnsupportedError, printable

__all__ = ["Sources"]

_TEMPLATE = re.compile(r"(?:additional_chat_templates|chat_templates)/([A-Za-z0-9_-]{1,64})\.jinja")
_SPECIAL = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


class Sources:
    """What a checkpoint carries of its tokenizer.

    Parameters
    ----------
    checkpoint : Checkpoint
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._files = {file.path: file for file in checkpoint.files}

    def has(self, name: str) -> bool:
        """Say whether there is such a file."""
        return name in self._files

    def size(self, name: str) -> int:
        """Return a file's size in bytes."""
        return self._files[name].nbytes

    def bytes(self, name: str) -> bytes:
        """Return a file's bytes."""
        return self._files[name].read()

    def json(self, name: str) -> dict[str, Any]:
        """Return a JSON file's object, an empty one if there is no such file.

        Raises
        ------
        InputError
            If it is not strict JSON, or not an object.
        """
        if name not in self._files:
            return {}
        try:
            found = strict_json.loads(self.bytes(name))
        except strict_json.StrictJsonError as error:
            raise self.wrong(name, f"is not strict JSON: {error}") from None
        if not isinstance(found, dict):
            raise self.wrong(name, "is not a JSON object")
        return found

    def wrong(self, name: str, what: str) -> InputError:
        """Return an error about one of the files."""
        return InputError(f"{name} {what}", path=self.checkpoint.path)

    def refused(self, what: str, hint: str | None = None) -> UnsupportedError:
        """Return an error about a tokenizer that llama.cpp has no equal of."""
        return UnsupportedError(what, path=self.checkpoint.path, hint=hint)

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
    def model_config(self) -> dict[str, Any]:
        """``config.json`` of the model."""
        if self.checkpoint.config is None:
            return {}
        try:
            found = strict_json.loads(self.checkpoint.config)
        except strict_json.StrictJsonError as error:
            raise self.wrong("config.json", f"is not strict JSON: {error}") from None
        return found if isinstance(found, dict) else {}

    @cached_property
    def special_ids(self) -> dict[str, int]:
        """The numbers of special tokens that the model's configs give, the first of several."""
        found = {}
        for values in (self.model_config, self.json("generation_config.json")):
            for kind in ("bos", "eos", "pad"):
                number = values.get(f"{kind}_token_id")
                if isinstance(number, list) and number:
                    number = number[0]
                if type(number) is int:
                    found[kind] = number
        return found

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
