"""Vocabularies in GGUF: text, type and score of each token, the added ones among them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from loraformat.errors import InputError, printable
from loraformat_converters.gguf.container.types import ValueType
from loraformat_converters.gguf.container.values import GGUFValue
from loraformat_converters.gguf.tokenizers.sources import Sources

__all__ = [
    "Converted", "TokenKind", "Vocabulary", "added_tokens", "put_added_tokens", "stripping_note",
]  # fmt: skip


#: Texts that make llama.cpp override a token's kind (llama-vocab.cpp); of some only the first.
_LOOKS = frozenset({
    "</s>", "<EOT>", "_<EOT>", "< EOT >", "[EOT]", "[EOS]", "[PAD]", "<eos>", "<end_of_turn>",
    "<end_of_utterance>", "<turn|>", "<|calls|>", "<|call|>", "<|channel|>", "<|constrain|>",
    "<|end_of_text|>", "<|end|>", "<|endoftext|>", "<|eom_id|>", "<|eot_id|>", "<|flush|>",
    "<|im_end|>", "<|return|>", "<|tool_response>", "<｜end▁of▁sentence｜>",
    "<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<|code_prefix|>", "<｜fim▁begin｜>", "<PRE>",
    "<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<|code_suffix|>", "<｜fim▁hole｜>", "<SUF>",
    "<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<|code_middle|>", "<｜fim▁end｜>", "<MID>",
    "<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "<|fim_repo|>", "<|repo_name|>", "<fim-repo>",
    "<REPO>", "<reponame>", "<|file_sep|>", "<|prefix|>", "<|suffix|>", "<|middle|>",
})  # fmt: skip


class TokenKind(IntEnum):
    """``tokenizer.ggml.token_type``."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass
class Converted:
    """A tokenizer on its way into a GGUF file.

    Attributes
    ----------
    keys : dict of str to GGUFValue
        All but those about special tokens.
    vocabulary : Vocabulary
    notes : list of str
        Where llama.cpp will do something else.
    special : dict of str to int
        Numbers of special tokens that the tokenizer itself knows, by kind.
    """

    keys: dict[str, GGUFValue]
    vocabulary: Vocabulary
    notes: list[str]
    special: dict[str, int] = field(default_factory=dict)


class Vocabulary:
    """Tokens by number, in so many rows as the embedding has. Rows that get none are padded.

    Examples
    --------
    >>> vocabulary = Vocabulary(3, "tokenizer.json")
    >>> vocabulary.put(1, "a", TokenKind.NORMAL)
    >>> vocabulary.texts
    ['[PAD0]', 'a', '[PAD2]']
    """

    def __init__(self, rows: int, file: str) -> None:
        self.rows, self.file = rows, file
        self._texts: list[str | None] = [None] * rows
        self.kinds: list[int] = [TokenKind.UNUSED] * rows
        self.scores: list[float] = [-10000.0] * rows
        self.beyond: list[str] = []

    def put(self, number: Any, text: Any, kind: TokenKind, score: float = 0.0) -> None:
        """Give a row its token.

        Raises
        ------
        InputError
            If there is no such row, or the text is none.
        """
        if not isinstance(text, str) or not text:
            raise InputError(f"{self.file} has a token without a text")
        if type(number) is not int or not 0 <= number < self.rows:
            raise InputError(
                f"{self.file} numbers token {printable(text)} {printable(str(number))}, and the "
                f"embedding has {self.rows} rows"
            )
        self._texts[number], self.kinds[number], self.scores[number] = text, kind, score

    def put_added(self, token: Any, text: str, kind: TokenKind, score: float = 0.0) -> None:
        """Give a row an added token; one beyond the embedding is only noted."""
        number = token.get("id")
        if type(number) is int and number >= self.rows:
            self.beyond.append(text)
        else:
            self.put(number, text, kind, score)

    @property
    def unknown(self) -> int | None:
        """Number of the token for what is not known."""
        return self.kinds.index(TokenKind.UNKNOWN) if TokenKind.UNKNOWN in self.kinds else None

    @property
    def texts(self) -> list[str]:
        """All texts; rows without a token have one that no other has."""
        given = {text for text in self._texts if text is not None}
        found = []
        for number, text in enumerate(self._texts):
            if text is None:
                text = f"[PAD{number}]"
                while text in given:
                    text = f"[{text}]"
            found.append(text)
        return found

    def numbers(self) -> dict[str, int]:
        """Return each given text's number.

        Raises
        ------
        InputError
            If two rows have the same text: llama.cpp would not start.
        """
        found: dict[str, int] = {}
        for number, text in enumerate(self._texts):
            if text is None:
                continue
            if text in found:
                raise InputError(
                    f"{self.file} gives tokens {found[text]} and {number} the same text "
                    f"{printable(text)}"
                )
            found[text] = number
        return found

    def keys(self, *, scores: bool = False) -> dict[str, GGUFValue]:
        """Return the arrays."""
        self.numbers()
        found = {
            "tokenizer.ggml.tokens": GGUFValue.texts(self.texts),
            "tokenizer.ggml.token_type": GGUFValue.of_array(ValueType.INT32, self.kinds),
        }
        if scores:
            found["tokenizer.ggml.scores"] = GGUFValue.of_array(ValueType.FLOAT32, self.scores)
        return found

    def notes(self) -> list[str]:
        """Say what has no place, and what llama.cpp takes for something else."""
        notes = []
        if self.beyond:
            notes.append(
                f"{len(self.beyond)} added tokens have numbers beyond the embedding and were left "
                f"out ({printable(self.beyond[0])}, ...)"
            )
        pairs = zip(self._texts, self.kinds, strict=True)
        looks = [text for text, kind in pairs if text in _LOOKS and kind == TokenKind.NORMAL]
        if looks:
            notes.append(
                f"{printable(', '.join(looks))}, a plain token, may be a control token in "
                "llama.cpp, which matches the text: any text that spells it becomes that token"
            )
        return notes


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
