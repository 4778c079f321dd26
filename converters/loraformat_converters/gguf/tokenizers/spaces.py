"""Conversion of the handling of spaces in ``tokenizer.json``.

llama.cpp's SentencePiece writes ``▁`` for every space and, if ``add_space_prefix`` is set, puts
one more in front of a text and of what follows a special token. ``tokenizer.json`` has several
ways to say that, and some that come near.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from loraformat.errors import UnsupportedError, printable
from loraformat_converters.gguf.tokenizers.sources import Sources, steps_in
from loraformat_converters.gguf.tokenizers.vocabulary import added_tokens

__all__ = ["Spaces", "marks_spaces", "spaces_of"]

_FORMS = ("NFC", "NFD", "NFKC", "NFKD", "Nmt", "Precompiled")


@dataclass
class Spaces:
    """How spaces are converted, and notes where llama.cpp does otherwise."""

    replaced: bool = False  # ▁ stands for them
    prefix: bool = False  # one more stands in front
    split: bool = False  # a token has ▁ at its beginning only
    notes: list[str] = field(default_factory=list)

    def check(self, pieces: Iterable[str]) -> None:
        """Check that texts are not split where llama.cpp would merge.

        Raises
        ------
        UnsupportedError
            If a piece has a space inside although texts are split at spaces.
        """
        inside = next((one for one in pieces if self.split and "▁" in one[1:]), None)
        if inside is not None:
            raise UnsupportedError(
                f"tokenizer.json splits texts at spaces, and llama.cpp's SentencePiece does not: "
                f"it would find the token {printable(inside)}"
            )


def spaces_of(sources: Sources) -> Spaces:
    """Return what a tokenizer's normalizer and pre-tokenizer do.

    Raises
    ------
    UnsupportedError
        If llama.cpp does nothing like it.
    """
    found = Spaces()
    for step in steps_in(sources.tokenizer.get("normalizer"), "normalizers"):
        _normalizer(sources, found, step)
    prepends = found.prefix
    for step in steps_in(sources.tokenizer.get("pre_tokenizer"), "pretokenizers"):
        _pre_tokenizer(sources, found, step)
    if not found.replaced:
        raise sources.refused(
            "tokenizer.json keeps spaces, and llama.cpp's SentencePiece writes ▁ for them"
        )
    if prepends:
        found.notes += _prepending_notes(sources)
    return found


def _prepending_notes(sources: Sources) -> list[str]:
    notes = []
    named = str(sources.config.get("tokenizer_class")).removesuffix("Fast")
    if named == "LlamaTokenizer" and sources.model_config.get("model_type") == "llama":
        notes.append(
            "transformers 5 does not heed the normalizer of tokenizer.json for a LlamaTokenizer: "
            "it puts no space before a text that begins with one, nor after special tokens; "
            "llama.cpp does, as SentencePiece and earlier versions do"
        )
    late = [token["content"] for token in added_tokens(sources) if token.get("normalized")]
    if late:
        notes.append(
            f"tokenizer.json finds {len(late)} added tokens only after a space "
            f"({printable(late[0])}, ...: they are normalized), llama.cpp finds them anywhere"
        )
    return notes


def marks_spaces(tokenizer: dict[str, Any]) -> bool:
    """Say whether a ``tokenizer.json`` writes ``▁`` for spaces, as SentencePiece does.

    Examples
    --------
    >>> marks_spaces({"pre_tokenizer": {"type": "Metaspace", "replacement": "▁"}})
    True
    >>> marks_spaces({"pre_tokenizer": {"type": "ByteLevel"}})
    False
    """
    steps = [
        *steps_in(tokenizer.get("normalizer"), "normalizers"),
        *steps_in(tokenizer.get("pre_tokenizer"), "pretokenizers"),
    ]
    return any(
        "▁" in (step.get("replacement"), step.get("content"), step.get("prepend"))
        for step in steps
        if isinstance(step, dict)
    )


def _normalizer(sources: Sources, found: Spaces, step: Any) -> None:
    kind = step.get("type") if isinstance(step, dict) else None
    if kind == "Prepend" and step.get("prepend") == "▁":
        found.prefix = True
    elif kind == "Replace" and _is_space(step.get("pattern")) and step.get("content") == "▁":
        found.replaced = True
    elif kind in _FORMS:
        found.notes.append(
            f"llama.cpp does not normalize texts, tokenizer.json does ({kind}): rare characters "
            "get other tokens"
        )
    else:
        raise sources.refused(
            f"tokenizer.json normalizes texts with {printable(str(kind))}, and llama.cpp's "
            "SentencePiece does not"
        )


def _pre_tokenizer(sources: Sources, found: Spaces, step: Any) -> None:
    kind = step.get("type") if isinstance(step, dict) else None
    if kind == "Metaspace" and step.get("replacement") == "▁":
        _metaspace(found, step)
    elif not (kind == "Split" and found.replaced and _is_space(step.get("pattern"))):
        raise sources.refused(
            f"tokenizer.json splits texts with {printable(str(kind))}, and llama.cpp's "
            "SentencePiece does not split them"
        )


def _metaspace(found: Spaces, step: dict[str, Any]) -> None:
    found.replaced = True
    found.split = step.get("split", True) is not False
    scheme = step.get("prepend_scheme", "always")
    if scheme == "never" or step.get("add_prefix_space") is False or found.prefix:
        return
    found.prefix = True
    found.notes.append(
        "llama.cpp puts a space before every text, tokenizer.json (Metaspace) not before one that "
        "begins with a space"
    )
    if scheme == "first":
        found.notes.append(
            "llama.cpp puts a space after special tokens, too, tokenizer.json (Metaspace, first) "
            "only before the whole text"
        )


def _is_space(pattern: Any) -> bool:
    return isinstance(pattern, dict) and pattern.get("String") == " "
