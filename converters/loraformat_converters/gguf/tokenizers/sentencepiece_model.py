"""Conversion of a ``tokenizer.model`` without ``tokenizer.json``.

Pieces, scores and kinds are taken over as they are: BPE of SentencePiece and of llama.cpp is
the same procedure. Tokens that were added later stand in ``added_tokens.json`` and in
``tokenizer_config.json``.
"""

from __future__ import annotations

from typing import Any

from loraformat.errors import printable
from loraformat_converters.gguf.container.values import GGUFValue
from loraformat_converters.gguf.tokenizers.model_proto import Model, parse
from loraformat_converters.gguf.tokenizers.protobuf import WireError
from loraformat_converters.gguf.tokenizers.sources import Sources
from loraformat_converters.gguf.tokenizers.spm import check_bytes, keys_of
from loraformat_converters.gguf.tokenizers.vocabulary import Converted, TokenKind, Vocabulary

__all__ = ["FILE", "to_gguf"]

FILE = "tokenizer.model"
_MAX_BYTES = 64 << 20


def to_gguf(sources: Sources, rows: int) -> Converted:
    """Return the converted tokenizer; see `tokenizers.Convert`."""
    model = _read(sources)
    _check(sources, model)
    vocabulary = Vocabulary(rows, FILE)
    scores = {piece.text: piece.score for piece in model.pieces}
    for number, piece in enumerate(model.pieces):
        text = piece.text
        if piece.kind is TokenKind.USER_DEFINED:  # found in a text, where spaces are spaces
            text = text.replace("▁", " ")
        vocabulary.put(number, text, piece.kind, piece.score)
    for number, text, is_special in _added(sources):
        if number < len(model.pieces) and model.pieces[number].text == text:
            if is_special and model.pieces[number].kind is not TokenKind.UNKNOWN:
                vocabulary.kinds[number] = TokenKind.CONTROL
            continue
        kind = TokenKind.CONTROL if is_special else TokenKind.USER_DEFINED
        vocabulary.put_added({"id": number}, text, kind, scores.get(text, 0.0))
    keys = keys_of(vocabulary, add_space_prefix=model.add_dummy_prefix)
    keys["tokenizer.ggml.remove_extra_whitespaces"] = GGUFValue.flag(model.remove_extra_whitespaces)
    special = {name: n for name, n in model.special.items() if 0 <= n < len(model.pieces)}
    return Converted(keys, vocabulary, _notes(model), special)


def _read(sources: Sources) -> Model:
    size = sources.size(FILE)
    if size > _MAX_BYTES:
        raise sources.wrong(FILE, f"has {size} bytes, more than {_MAX_BYTES}")
    try:
        return parse(sources.bytes(FILE))
    except WireError as error:
        raise sources.wrong(FILE, f"is not a SentencePiece model: it {error}") from None


def _check(sources: Sources, model: Model) -> None:
    if model.algorithm != "BPE":
        raise sources.refused(
            f"{FILE} is SentencePiece of the kind {printable(model.algorithm)}, and llama.cpp has "
            "BPE alone for such a model"
        )
    if not model.escape_whitespaces or model.treat_whitespace_as_suffix:
        raise sources.refused(
            f"{FILE} does not write ▁ before words, and llama.cpp's SentencePiece does"
        )
    check_bytes(sources, FILE, {piece.text for piece in model.pieces})


def _notes(model: Model) -> list[str]:
    notes = []
    if model.charsmap:
        notes.append(
            "llama.cpp does not normalize texts, tokenizer.model does: rare characters get other "
            "tokens"
        )
    if model.remove_extra_whitespaces:
        notes.append("llama.cpp keeps runs of spaces, tokenizer.model makes them one")
    unused = [piece.text for piece in model.pieces if piece.kind is TokenKind.UNUSED]
    if unused:
        notes.append(
            f"llama.cpp may find {len(unused)} tokens that tokenizer.model calls unused "
            f"({printable(unused[0])}, ...)"
        )
    return notes


def _added(sources: Sources) -> list[tuple[int, str, bool]]:
    """Return tokens that are not in the model or not only there: number, text, special."""
    found: list[tuple[int, str, bool]] = []
    for text, number in sources.json("added_tokens.json").items():
        found.append((_number(sources, "added_tokens.json", number), text, False))
    table = sources.config.get("added_tokens_decoder")
    for key, token in (table if isinstance(table, dict) else {}).items():
        if not isinstance(token, dict) or not isinstance(token.get("content"), str):
            raise sources.wrong("tokenizer_config.json", "has a damaged added_tokens_decoder")
        digits = key.isascii() and key.isdigit()
        number = _number(sources, "tokenizer_config.json", int(key[:20]) if digits else key)
        found.append((number, token["content"], token.get("special") is True))
    return found


def _number(sources: Sources, file: str, number: Any) -> int:
    if type(number) is not int or not 0 <= number < 1 << 31:
        raise sources.wrong(file, f"numbers a token {printable(str(number))}")
    return number
