"""SentencePiece BPE tokenizers (Llama 2, Mistral, Mixtral, Gemma, Phi-3).

llama.cpp cuts special tokens out of a text, writes ``▁`` for spaces, may put one in front of
each part, and merges neighbours by the score of the token that they make. What is left and is
no token becomes bytes. In ``tokenizer.json`` that is BPE with ``byte_fallback``; `merging` says
when the two cut alike.
"""

from __future__ import annotations

from collections.abc import Container
from itertools import pairwise
from math import isfinite
from typing import TYPE_CHECKING, Any

from loraformat.errors import InputError, printable
from loraformat_converters.gguf.container.types import ValueType
from loraformat_converters.gguf.container.values import GGUFValue
from loraformat_converters.gguf.tokenizers.bpe import (
    bpe_model,
    merge_pairs,
    model_vocabulary,
    refuse_options,
)
from loraformat_converters.gguf.tokenizers.merging import Order, Pair, order_of, splits
from loraformat_converters.gguf.tokenizers.sources import Sources
from loraformat_converters.gguf.tokenizers.spaces import spaces_of
from loraformat_converters.gguf.tokenizers.vocabulary import (
    Converted,
    TokenKind,
    Vocabulary,
    added_tokens,
    put_added_tokens,
    stripping_note,
)
from loraformat_converters.gguf.tokenizers.written import Tokens, tokenizer_json

if TYPE_CHECKING:
    from loraformat_converters.gguf.container.reader import GGUFFile

__all__ = ["BYTES", "SPECIAL_IDS", "check_bytes", "from_gguf", "keys_of", "to_gguf"]

_FILE = "tokenizer.json"
_OPTIONS = ("continuing_subword_prefix", "end_of_word_suffix", "ignore_merges", "dropout")
BYTES = tuple(f"<0x{number:02X}>" for number in range(256))
#: What llama.cpp takes if the file does not say.
SPECIAL_IDS = {"bos": 1, "eos": 2, "unk": 0}


def to_gguf(sources: Sources, rows: int) -> Converted:
    """Return the tokenizer converted from ``tokenizer.json``; see `tokenizers.Convert`."""
    model = sources.tokenizer["model"]
    refuse_options(sources, model, _OPTIONS, "SentencePiece")
    spaces = spaces_of(sources)
    table = model_vocabulary(sources, model)
    check_bytes(sources, _FILE, table)
    # Those with ▁ are not found in a text, which has spaces; merging builds them.
    cut = {
        token["content"]
        for token in added_tokens(sources)
        if "▁" not in token["content"] or (not token.get("special") and token.get("normalized"))
    }
    order = order_of(merge_pairs(sources, model, table), table.keys() - cut, cut)
    spaces.check(order.texts)
    vocabulary = _vocabulary(sources, rows, table, order)
    keys = keys_of(vocabulary, add_space_prefix=spaces.prefix)
    return Converted(keys, vocabulary, spaces.notes + stripping_note(sources) + _notes(order))


def _vocabulary(sources: Sources, rows: int, table: dict[str, int], order: Order) -> Vocabulary:
    vocabulary, unknown = Vocabulary(rows, _FILE), sources.tokenizer["model"].get("unk_token")
    scores = {text: -float(place) for place, text in enumerate(order.texts)}
    for text, number in table.items():
        kind = TokenKind.BYTE if text in _BYTE_SET else TokenKind.NORMAL
        kind = TokenKind.UNKNOWN if text == unknown else kind
        score = 0.0 if kind is TokenKind.BYTE else scores.get(text, -float(len(scores)))
        vocabulary.put(number, text, kind, score)
    put_added_tokens(sources, vocabulary, unknown=unknown, spaced=True, scores=scores)
    return vocabulary


def _notes(order: Order) -> list[str]:
    if not order.unsure:
        return []
    return [
        f"tokenizer.json merges into {len(order.unsure)} tokens ({printable(order.unsure[0])}, "
        "...) in varying order relative to other merges, llama.cpp always in the same order: "
        "texts with them may be tokenized differently"
    ]


_BYTE_SET = frozenset(BYTES)


def check_bytes(sources: Sources, file: str, texts: Container[str]) -> None:
    """Refuse a vocabulary with a byte that neither has a token nor is a character that has one."""
    for number, text in enumerate(BYTES):
        if text not in texts and (number >= 128 or chr(number) not in texts):
            raise sources.refused(
                f"{file} has no token for the byte {text}, and llama.cpp's SentencePiece stops "
                "where it finds no token"
            )


def keys_of(vocabulary: Vocabulary, *, add_space_prefix: bool) -> dict[str, GGUFValue]:
    """Return the keys of a SentencePiece vocabulary."""
    return {
        "tokenizer.ggml.model": GGUFValue.text("llama"),
        "tokenizer.ggml.pre": GGUFValue.text("default"),
        **vocabulary.keys(scores=True),
        "tokenizer.ggml.add_space_prefix": GGUFValue.flag(add_space_prefix),
    }


def from_gguf(gguf: GGUFFile, tokens: Tokens) -> tuple[dict[str, Any], str | None]:
    """Return ``tokenizer.json``, and where it will cut texts otherwise.

    Raises
    ------
    InputError
        If the metadata is damaged.
    """
    scores = _scores(gguf, len(tokens.texts))
    table = tokens.vocabulary()
    cut = {text for text in tokens.found_in_texts() if "▁" not in text}
    pairs = splits(table.keys() - cut, cut)
    # Of equal scores llama.cpp takes the leftmost: a run grows until it is the longest there is.
    order = sorted(pairs, key=lambda text: (-scores[table[text]], -len(text), table[text]))
    mixed = [text for text in order if len(set(text)) > 1]
    tied = sum(scores[table[a]] == scores[table[b]] for a, b in pairwise(mixed))
    bare = _characters(pairs, table)
    merges = [
        [left, right]
        for text in order
        for left, right in pairs[text]
        if left in table and right in table
    ]
    prefix = gguf.flag("tokenizer.ggml.add_space_prefix", True)
    unknown = tokens.special.get("unk")
    steps = [*(_PREPEND if prefix else []), _REPLACE]
    made = tokenizer_json(
        tokens,
        normalizer={"type": "Sequence", "normalizers": steps},
        pre_tokenizer=None,
        decoder={"type": "Sequence", "decoders": [*_DECODERS, *(_STRIP if prefix else [])]},
        model=bpe_model(
            table,
            merges,
            unk_token=None if unknown is None else tokens.texts[unknown],
            fuse_unk=True,
            byte_fallback=True,
        ),
    )
    return made, _difference(tied, bare)


def _characters(pairs: dict[str, list[Pair]], table: dict[str, int]) -> list[str]:
    """Let merges begin with characters that are one byte; return those that are several.

    llama.cpp merges characters that are no tokens. A byte below 128 is such a character, and is
    one in ``tokenizer.json`` if its token is called so.
    """
    halves = {half for of in pairs.values() for pair in of for half in pair if len(half) == 1}
    several = []
    for half in sorted(halves - table.keys()):
        byte = BYTES[ord(half)] if ord(half) < 128 else ""
        if byte in table:
            table[half] = table.pop(byte)
        else:
            several.append(half)
    return several


def _scores(gguf: GGUFFile, count: int) -> list[float]:
    if "tokenizer.ggml.scores" not in gguf.metadata:
        return [0.0] * count
    found = gguf.array("tokenizer.ggml.scores", ValueType.FLOAT32, ValueType.INT32)
    if len(found) < count:
        raise InputError(f"has {count} tokens, and scores of {len(found)}", path=gguf.path)
    if not all(map(isfinite, found)):
        raise InputError("has a token whose score is not finite", path=gguf.path)
    return found


def _difference(tied: int, bare: list[str]) -> str | None:
    said = []
    if tied:
        said.append(
            f"the order of {tied + 1} tokens with equal scores, which llama.cpp merges from left "
            "to right and tokenizer.json by rank"
        )
    if bare:
        said.append(
            f"tokens of {len(bare)} characters that are no tokens ({printable(bare[0])}, ...), "
            "which llama.cpp merges all the same"
        )
    return f"{'; '.join(said)}: texts with them may be tokenized differently" if said else None


_PREPEND = [{"type": "Prepend", "prepend": "▁"}]
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
_DECODERS = [
    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
]
_STRIP = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]
