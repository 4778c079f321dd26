"""Byte-level BPE tokenizers (GPT-2, Llama 3, Qwen, tekken)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from loraformat.errors import UsageError, printable
from loraformat_converters.gguf.container.types import ValueType
from loraformat_converters.gguf.container.values import GGUFValue
from loraformat_converters.gguf.tokenizers.pre_tokenizers import (
    NAMES,
    PreTokenizer,
    by_name,
    described,
    recognised,
    steps_of,
)
from loraformat_converters.gguf.tokenizers.sources import Sources, steps_in
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

__all__ = [
    "bpe_model",
    "from_gguf",
    "merge_pairs",
    "model_vocabulary",
    "refuse_options",
    "to_gguf",
]

_FILE = "tokenizer.json"
_OPTIONS = ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
_NFC = (
    "tokenizer.json normalizes texts to NFC, and llama.cpp does not: letters whose "
    "accents are characters of their own get other tokens"
)


def to_gguf(sources: Sources, rows: int, pre: str | None) -> Converted:
    """Return the converted tokenizer; see `tokenizers.Convert`.

    ``pre`` is llama.cpp's name of the pre-tokenizer where it shall not be recognised; `UsageError`
    if llama.cpp does not know it.
    """
    model = sources.tokenizer["model"]
    name, notes = _pre_tokenizer(sources, model, pre)
    vocabulary = Vocabulary(rows, _FILE)
    table = model_vocabulary(sources, model)
    added = {token.get("id") for token in added_tokens(sources)}
    for text, number in table.items():
        if number not in added:
            vocabulary.put(number, text, TokenKind.NORMAL)
    put_added_tokens(sources, vocabulary)
    pairs = merge_pairs(sources, model, table)
    for left, right in pairs:
        if " " in left or " " in right:
            raise sources.refused(
                f"{_FILE} merges {printable(left)} and {printable(right)}, and a GGUF file keeps "
                "merges with a space between their halves"
            )
    keys = {
        "tokenizer.ggml.model": GGUFValue.text("gpt2"),
        "tokenizer.ggml.pre": GGUFValue.text(name),
        **vocabulary.keys(),
        "tokenizer.ggml.merges": GGUFValue.texts([*map(" ".join, pairs)]),
    }
    return Converted(keys, vocabulary, notes + stripping_note(sources))


def _pre_tokenizer(
    sources: Sources, model: dict[str, Any], pre: str | None
) -> tuple[str, list[str]]:
    ignore_merges = model.get("ignore_merges") is True
    if pre is not None:
        if pre not in NAMES:
            raise UsageError(
                f"llama.cpp has no pre-tokenizer {printable(pre)}",
                hint=f"known are {', '.join(NAMES)}",
            )
        return pre, []
    notes = _check_options(sources, model)
    steps = steps_of(sources.tokenizer.get("pre_tokenizer"))
    found = None if steps is None else recognised(steps, ignore_merges)
    if found is None:
        raise sources.refused(
            f"the pre-tokenizer of {_FILE} is not one that is recognised",
            hint="if you know that llama.cpp has it, name it with --pre; known are "
            + ", ".join(NAMES),
        )
    if found.approximate is not None:
        notes.append(f"{found.approximate} ({found.names[0]})")
    if found.ignore_merges != ignore_merges:
        verb = "takes" if found.ignore_merges else "does not take"
        notes.append(
            f"llama.cpp's pre-tokenizer {found.names[0]} {verb} whole words that are tokens "
            f"without merging, {_FILE} says the opposite: words that merges do not form get other "
            "tokens"
        )
    return found.names[0], notes


def _check_options(sources: Sources, model: dict[str, Any]) -> list[str]:
    """Refuse what llama.cpp cannot do; return what it leaves out."""
    steps = steps_in(sources.tokenizer.get("normalizer"), "normalizers")
    kinds = [step.get("type") for step in steps if isinstance(step, dict)]
    if strange := [kind for kind in kinds if kind != "NFC"]:
        raise sources.refused(
            f"{_FILE} normalizes texts with {printable(str(strange[0]))}, and llama.cpp's "
            "byte-level BPE does not",
            hint="name a pre-tokenizer with --pre to convert it all the same",
        )
    refuse_options(sources, model, _OPTIONS, "byte-level BPE")
    return [_NFC] if kinds else []


def refuse_options(
    sources: Sources, model: dict[str, Any], options: Iterable[str], kind: str
) -> None:
    """Refuse options of BPE that llama.cpp's tokenizer of this kind does not have."""
    for option in options:
        if model.get(option):
            raise sources.refused(
                f"{_FILE} is BPE with {option}, which llama.cpp's {kind} does not have"
            )


def model_vocabulary(sources: Sources, model: dict[str, Any]) -> dict[str, int]:
    """Return ``model.vocab``.

    Raises
    ------
    InputError
        If it is not a table of texts and numbers.
    """
    table = model.get("vocab")
    if not isinstance(table, dict) or not all(type(one) is int for one in table.values()):
        raise sources.wrong(_FILE, "has no vocabulary")
    return table


def merge_pairs(
    sources: Sources, model: dict[str, Any], table: dict[str, int]
) -> list[tuple[str, str]]:
    """Return ``model.merges``, in either of its spellings.

    Raises
    ------
    InputError
        If one is damaged, or makes no token.
    """
    found = []
    merges = model.get("merges")
    if not isinstance(merges, list):
        raise sources.wrong(_FILE, "has no merges")
    for merge in merges:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(
            isinstance(half, str) for half in pair
        ):  # fmt: skip
            raise sources.wrong(_FILE, f"has the damaged merge {printable(str(merge))}")
        if pair[0] + pair[1] not in table:
            raise sources.wrong(
                _FILE, f"merges {printable(pair[0])} and {printable(pair[1])} into no token"
            )
        found.append((pair[0], pair[1]))
    return found


def from_gguf(gguf: GGUFFile, tokens: Tokens) -> dict[str, Any] | str:
    """Return ``tokenizer.json``, or a sentence that says why there is none."""
    name = gguf.text("tokenizer.ggml.pre", "default")
    pre: PreTokenizer | None = by_name(name)
    if pre is None:
        return (
            f"tokenizer files (what llama.cpp's pre-tokenizer {printable(name)} is in "
            "tokenizer.json is not known)"
        )
    merges = [
        merge.split(" ", 1) for merge in gguf.array("tokenizer.ggml.merges", ValueType.STRING)
    ]
    known = set(tokens.texts)
    for merge in merges:
        if len(merge) != 2 or not {*merge, "".join(merge)} <= known:
            return f"tokenizer files (its merge {printable(' '.join(merge))} makes no token)"
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
             "use_regex": True}  # fmt: skip
    return tokenizer_json(
        tokens,
        normalizer=None if pre.normalizer is None else {"type": pre.normalizer},
        pre_tokenizer=described(pre),
        decoder=level,
        model=bpe_model(tokens.vocabulary(), merges, ignore_merges=pre.ignore_merges),
    )


def bpe_model(table: dict[str, int], merges: list[list[str]], **options: Any) -> dict[str, Any]:
    """Return ``model`` of ``tokenizer.json``; options that are not named are off."""
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        **options,
        "vocab": table,
        "merges": merges,
    }
