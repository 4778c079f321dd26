"""Tokenizer files generated from a GGUF file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from loraformat.errors import InputError
from loraformat.model.checkpoint import CarriedFile
from loraformat_converters.gguf.container.types import ValueType
from loraformat_converters.gguf.tokenizers.chat import template_files
from loraformat_converters.gguf.tokenizers.special import NAMES
from loraformat_converters.gguf.tokenizers.vocabulary import TokenKind

if TYPE_CHECKING:
    from loraformat_converters.gguf.container.reader import GGUFFile

__all__ = ["Tokens", "tokenizer_files", "tokenizer_json"]

_ADDED = (TokenKind.CONTROL, TokenKind.USER_DEFINED, TokenKind.UNKNOWN)


class Tokens:
    """The vocabulary of a GGUF file and its special tokens.

    ``special`` are the numbers that llama.cpp takes where the file does not say.

    Raises
    ------
    InputError
        If its arrays do not fit together.
    """

    def __init__(self, gguf: GGUFFile, special: Mapping[str, int]) -> None:
        self.texts: list[str] = gguf.array("tokenizer.ggml.tokens", ValueType.STRING)
        self.kinds: list[int] = [TokenKind.NORMAL] * len(self.texts)
        if "tokenizer.ggml.token_type" in gguf.metadata:
            self.kinds = gguf.array("tokenizer.ggml.token_type", ValueType.INT32)
        if len(self.kinds) != len(self.texts):
            raise InputError(
                f"has {len(self.texts)} tokens, and types of {len(self.kinds)}", path=gguf.path
            )
        self.special: dict[str, int] = {}
        for kind, name in NAMES.items():
            number = gguf.integer(f"tokenizer.ggml.{name}_token_id", special.get(kind, -1))
            if 0 <= number < len(self.texts):
                self.special[kind] = number
        self.first: list[int] = []
        self.last: list[int] = []

    def around(self, gguf: GGUFFile, *, bos: bool) -> None:
        """Take from the file which tokens are put around a text."""
        for kind, side, default in (("bos", self.first, bos), ("eos", self.last, False)):
            if kind in self.special and gguf.flag(f"tokenizer.ggml.add_{kind}_token", default):
                side.append(self.special[kind])

    def vocabulary(self) -> dict[str, int]:
        """Return numbers by text, without the rows that are only padding."""
        found: dict[str, int] = {}
        for number, text in enumerate(self.texts):
            padding = self.kinds[number] == TokenKind.UNUSED and "[PAD" in text
            if not padding and text:
                found.setdefault(text, number)
        return found

    def found_in_texts(self) -> set[str]:
        """Return the texts of the tokens that are found in a text before it is cut."""
        return {t for t, kind in zip(self.texts, self.kinds, strict=True) if kind in _ADDED}

    def added(self) -> list[dict[str, Any]]:
        """Return the tokens that are found in a text before it is cut."""
        return [
            {"id": number, "content": text, "single_word": False, "lstrip": False,
             "rstrip": False, "normalized": False,
             "special": self.kinds[number] != TokenKind.USER_DEFINED}
            for number, text in enumerate(self.texts)
            if text and self.kinds[number] in _ADDED
        ]  # fmt: skip


def tokenizer_json(tokens: Tokens, **parts: Any) -> dict[str, Any]:
    """Return ``tokenizer.json`` of these parts."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": tokens.added(),
        "normalizer": parts["normalizer"],
        "pre_tokenizer": parts["pre_tokenizer"],
        "post_processor": _processor(tokens),
        "decoder": parts["decoder"],
        "model": parts["model"],
    }


def _processor(tokens: Tokens) -> dict[str, Any] | None:
    if not tokens.first and not tokens.last:
        return None

    def pieces(sequence: str, kind: int) -> list[dict[str, Any]]:
        return [
            *({"SpecialToken": {"id": tokens.texts[n], "type_id": kind}} for n in tokens.first),
            {"Sequence": {"id": sequence, "type_id": kind}},
            *({"SpecialToken": {"id": tokens.texts[n], "type_id": kind}} for n in tokens.last),
        ]

    special = {
        tokens.texts[n]: {"id": tokens.texts[n], "ids": [n], "tokens": [tokens.texts[n]]}
        for n in (*tokens.first, *tokens.last)
    }
    return {
        "type": "TemplateProcessing",
        "single": pieces("A", 0),
        "pair": [*pieces("A", 0), *pieces("B", 1)],
        "special_tokens": special,
    }


def tokenizer_files(
    gguf: GGUFFile, tokens: Tokens, tokenizer: dict[str, Any]
) -> tuple[CarriedFile, ...]:
    """Return all files: those given, ``tokenizer_config.json`` and the chat templates."""
    values: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    for kind, number in tokens.special.items():
        # A config may name an ordinary token; transformers would cut texts at it.
        if tokens.kinds[number] in _ADDED:
            values[f"{kind}_token"] = tokens.texts[number]
    return (
        _carried("tokenizer.json", tokenizer),
        _carried("tokenizer_config.json", values),
        *template_files(gguf),
    )


def _carried(name: str, value: dict[str, Any]) -> CarriedFile:
    return CarriedFile.of(name, (json.dumps(value, ensure_ascii=False, indent=1) + "\n").encode())
