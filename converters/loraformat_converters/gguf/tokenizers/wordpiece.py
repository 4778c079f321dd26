"""WordPiece tokenizers (BERT).

llama.cpp has a vocabulary of its own making: a token that begins a word begins with ``▁``, one
that continues a word stands without its ``##``. A word is cut into the longest tokens from the
left; one that cannot be cut is unknown.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loraformat.errors import UnsupportedError, printable
from loraformat_converters.gguf.container.values import GGUFValue
from loraformat_converters.gguf.tokenizers.bpe import model_vocabulary
from loraformat_converters.gguf.tokenizers.sources import Sources
from loraformat_converters.gguf.tokenizers.special import Around, number_keys
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

__all__ = ["SPECIAL_IDS", "around_keys", "from_gguf", "to_gguf"]

_FILE = "tokenizer.json"
_LOWERCASE = "tokenizer.ggml.normalizer.lowercase"
_STRIP_ACCENTS = "tokenizer.ggml.normalizer.strip_accents"
#: What llama.cpp takes if the file does not say.
SPECIAL_IDS = {"bos": 101, "unk": 100, "sep": 102, "pad": 0, "mask": 103}


def to_gguf(sources: Sources, rows: int) -> Converted:
    """Return the converted tokenizer; see `tokenizers.Convert`."""
    model = sources.tokenizer["model"]
    prefix = model.get("continuing_subword_prefix", "##")
    if not isinstance(prefix, str) or not prefix:
        raise sources.refused(f"{_FILE} does not mark tokens that continue a word")
    lowercase, strip_accents = _normalizer(sources)
    pre = sources.tokenizer.get("pre_tokenizer")
    if not isinstance(pre, dict) or pre.get("type") != "BertPreTokenizer":
        kind = pre.get("type") if isinstance(pre, dict) else None
        raise sources.refused(
            f"{_FILE} splits texts into words with {printable(str(kind))}, and llama.cpp does as "
            "BertPreTokenizer does"
        )
    vocabulary = Vocabulary(rows, _FILE)
    added = {token["content"] for token in added_tokens(sources)}
    for text, number in model_vocabulary(sources, model).items():
        if text not in added:
            vocabulary.put(number, _spelled(text, prefix), TokenKind.NORMAL)
    put_added_tokens(sources, vocabulary, unknown=model.get("unk_token"))
    if vocabulary.unknown is None:
        raise sources.refused(f"{_FILE} has no added token for unknown words")
    keys = {
        "tokenizer.ggml.model": GGUFValue.text("bert"),
        "tokenizer.ggml.pre": GGUFValue.text("default"),
        **vocabulary.keys(),
        _LOWERCASE: GGUFValue.flag(lowercase),
        _STRIP_ACCENTS: GGUFValue.flag(strip_accents),
    }
    notes = _notes(lowercase, strip_accents)
    late = [token["content"] for token in added_tokens(sources) if token.get("normalized")]
    if late and (lowercase or strip_accents):
        notes.append(
            f"tokenizer.json finds {len(late)} added tokens ({printable(late[0])}, ...) with other "
            "capitals or accents, too; llama.cpp only as they are written"
        )
    return Converted(keys, vocabulary, notes + stripping_note(sources))


def _spelled(text: str, prefix: str) -> str:
    """Return llama.cpp's spelling; the prefix alone begins a word, as no word is empty."""
    inner = text.removeprefix(prefix)
    return inner if inner and inner != text else f"▁{text}"


def _normalizer(sources: Sources) -> tuple[bool, bool]:
    """Say whether texts become lower case, and lose their accents."""
    step = sources.tokenizer.get("normalizer")
    kind = step.get("type") if isinstance(step, dict) else None
    if not isinstance(step, dict) or kind != "BertNormalizer":
        raise sources.refused(
            f"{_FILE} normalizes texts with {printable(str(kind))}, and llama.cpp does as "
            "BertNormalizer does"
        )
    for option, what in (
        ("clean_text", "removes control characters"),
        ("handle_chinese_chars", "takes every Chinese character as a word"),
    ):
        if step.get(option, True) is not True:
            raise sources.refused(f"{_FILE} has {option} off, and llama.cpp always {what}")
    lowercase = step.get("lowercase", True) is True
    strip = step.get("strip_accents")
    return lowercase, lowercase if strip is None else strip is True


def _notes(lowercase: bool, strip_accents: bool) -> list[str]:
    notes = []
    if not lowercase or not strip_accents:
        notes.append(
            "llama.cpp before June 2026 turns all texts into lower case without accents; "
            "this tokenizer does not: use a newer one"
        )
    if strip_accents:
        notes.append(
            "llama.cpp strips all marks where BERT strips accents: vowel signs of Indic and "
            "other scripts get lost"
        )
    return notes


def around_keys(
    sources: Sources, found: Around, special: dict[str, int], rows: int
) -> dict[str, GGUFValue]:
    """Return the keys about special tokens: llama.cpp always puts BOS before, SEP behind.

    Raises
    ------
    UnsupportedError
        If the tokenizer puts something else around a text.
    InputError
        If it puts there what is no token.
    """
    if len(found.first) != 1 or len(found.last) != 1:
        raise sources.refused(
            f"the tokenizer puts {len(found.first)} tokens before a text and {len(found.last)} "
            "behind it, and llama.cpp's WordPiece always one"
        )
    for number in (*found.first, *found.last):
        if not 0 <= number < rows:
            raise sources.wrong(_FILE, f"puts token {number} around a text, and has {rows} tokens")
    numbers = {**special, "bos": found.first[0], "sep": found.last[0]}
    numbers.pop("eos", None)
    return number_keys(numbers)


def from_gguf(gguf: GGUFFile, tokens: Tokens) -> dict[str, Any]:
    """Return ``tokenizer.json``.

    Raises
    ------
    UnsupportedError
        If the file does not name the tokens that WordPiece needs.
    InputError
        If the metadata is damaged.
    """
    missing = next((kind for kind in ("bos", "sep", "unk") if kind not in tokens.special), None)
    if missing is not None:
        raise UnsupportedError(f"its vocabulary has no {missing} token", path=gguf.path)
    tokens.first, tokens.last = [tokens.special["bos"]], [tokens.special["sep"]]
    tokens.special["cls"] = tokens.special.pop("bos")
    found = tokens.found_in_texts()
    lowercase = gguf.flag(_LOWERCASE, True)
    table: dict[str, int] = {}
    for text, number in tokens.vocabulary().items():
        if text not in found:
            text = text[1:] if text.startswith("▁") and len(text) > 1 else f"##{text}"
        table.setdefault(text, number)
    return tokenizer_json(
        tokens,
        normalizer={
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": gguf.flag(_STRIP_ACCENTS, lowercase),
            "lowercase": lowercase,
        },
        pre_tokenizer={"type": "BertPreTokenizer"},
        decoder={"type": "WordPiece", "prefix": "##", "cleanup": True},
        model={
            "type": "WordPiece",
            "unk_token": tokens.texts[tokens.special["unk"]],
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": table,
        },
    )
