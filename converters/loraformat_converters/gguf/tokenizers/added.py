"""Added tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loraformat.errors import printable
from loraformat_converters.gguf.tokenizers.sources import Sources
from loraformat_converters.gguf.tokenizers.vocabulary import TokenKind, Vocabulary

__all__ = ["added_tokens", "put_added_tokens", "stripping_note"]


def added_tokens(sources: Sources) -> list[dict[str, Any]]:
    """Return ``added_tokens`` of ``tokenizer.json``, by number.

    Raises
    ------
    InputError
        If it is no list of tokens.
    """
    found = sources.tokenizer.get("added_tokens") or []
    if not isinstance(found, list) or not all(
        isinstance(one, dict) and isinstance(one.get("content"), str) and type(one.get("id")) is int
        for one in found
    ):
        raise sources.wrong("tokenizer.json", "has damaged added_tokens")
    return found


def put_added_tokens(
    sources: Sources,
    vocabulary: Vocabulary,
    *,
    unknown: str | None = None,
    spaced: bool = False,
    scores: Mapping[str, float] | None = None,
) -> None:
    """Give added tokens their rows, over what stood there.

    Parameters
    ----------
    sources : Sources
    vocabulary : Vocabulary
    unknown : str, optional
        The token for what is not known.
    spaced : bool
        What is found after spaces have become ``▁`` stands with spaces.
    scores : mapping of str to float, optional
        Of tokens that merging builds, too.
    """
    for token in added_tokens(sources):
        text = token["content"]
        kind = TokenKind.CONTROL if token.get("special") else TokenKind.USER_DEFINED
        if text == unknown:
            kind = TokenKind.UNKNOWN
        elif spaced and kind is TokenKind.USER_DEFINED and token.get("normalized"):
            text = text.replace("▁", " ")
        vocabulary.put_added(token, text, kind, (scores or {}).get(text, 0.0))


def stripping_note(sources: Sources) -> list[str]:
    """Say which tokens take spaces with them, which llama.cpp's do not."""
    found = [
        token["content"]
        for token in added_tokens(sources)
        if token.get("lstrip") or token.get("rstrip") or token.get("single_word")
    ]
    if not found:
        return []
    return [
        f"{len(found)} added tokens strip spaces or want whole words ({printable(found[0])}, "
        "...); llama.cpp's do neither, but for models whose name says Phi-3"
    ]
