"""Special tokens, and those that llama.cpp adds to a text.

What transformers puts around a text is said by ``add_bos_token`` and ``add_eos_token`` of
``tokenizer_config.json`` if one of them is there, otherwise by the post-processor of
``tokenizer.json``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from loraformat.errors import printable
from loraformat_converters.gguf.container.values import GGUFValue
from loraformat_converters.gguf.tokenizers.sources import Sources, steps_in
from loraformat_converters.gguf.tokenizers.vocabulary import Converted

__all__ = [
    "Around",
    "around",
    "around_keys",
    "around_notes",
    "by_config",
    "number_keys",
    "special_keys",
]

#: llama.cpp's names; "seperator" is how it spells it.
NAMES = {
    "bos": "bos",
    "eos": "eos",
    "unk": "unknown",
    "sep": "seperator",
    "pad": "padding",
    "cls": "cls",
    "mask": "mask",
}


@dataclass(frozen=True, slots=True)
class Around:
    """Numbers of the tokens before and after a text."""

    first: tuple[int, ...] = ()
    last: tuple[int, ...] = ()


def special_keys(sources: Sources, converted: Converted) -> dict[str, int]:
    """Return the numbers of the special tokens, by kind."""
    vocabulary = converted.vocabulary
    rows, numbers = vocabulary.rows, vocabulary.numbers()
    found = {kind: number for kind, number in sources.special_ids.items() if 0 <= number < rows}
    found |= converted.special
    for kind, text in sources.special.items():
        if text in numbers:
            found[kind] = numbers[text]
    if vocabulary.unknown is not None:
        found["unk"] = vocabulary.unknown
    return found


def around(sources: Sources, special: dict[str, int]) -> Around:
    """Return what is put around a text.

    Raises
    ------
    InputError
        If the post-processor is damaged.
    """
    said = (sources.config.get(f"add_{kind}_token") for kind in ("bos", "eos"))
    if any(isinstance(one, bool) for one in said):
        return by_config(sources, special)
    return _by_processor(sources)


def by_config(sources: Sources, special: dict[str, int], *, bos: bool = False) -> Around:
    """Return what ``tokenizer_config.json`` says; ``bos`` is what it says by saying nothing."""
    adds = {
        kind: sources.config.get(f"add_{kind}_token", default) is True and kind in special
        for kind, default in (("bos", bos), ("eos", False))
    }
    return Around(*((special[kind],) if added else () for kind, added in adds.items()))


def around_notes(sources: Sources, found: Around, texts: list[str]) -> list[str]:
    """Say where transformers 5 puts other tokens around a text than `around` found.

    It does not heed ``add_bos_token`` beside a ``tokenizer.json``; transformers 4 did for the
    classes that have it, and so does llama.cpp's converter.
    """
    if not isinstance(sources.tokenizer.get("post_processor"), dict):
        return []
    theirs, notes = _by_processor(sources), []
    for kind, side, ids, others in (
        ("bos", "before", found.first, theirs.first),
        ("eos", "after", found.last, theirs.last),
    ):
        if ids != others:
            notes.append(
                f"llama.cpp puts {_named(ids, texts)} {side} a text, as add_{kind}_token of "
                f"tokenizer_config.json says; transformers 5 puts {_named(others, texts)}, as the "
                "post-processor of tokenizer.json does"
            )
    return notes


def _named(ids: tuple[int, ...], texts: list[str]) -> str:
    shown = [texts[one] if 0 <= one < len(texts) else str(one) for one in ids]
    return printable(" ".join(shown)) or "nothing"


def _by_processor(sources: Sources) -> Around:
    first: list[int] = []
    last: list[int] = []
    for step in steps_in(sources.tokenizer.get("post_processor"), "processors"):
        kind = step.get("type") if isinstance(step, dict) else None
        if kind == "TemplateProcessing":
            _template(sources, step, first, last)
        elif kind in ("BertProcessing", "RobertaProcessing"):
            for side, name in ((first, "cls"), (last, "sep")):
                pair = step.get(name)
                if not isinstance(pair, list) or len(pair) != 2 or type(pair[1]) is not int:
                    raise sources.wrong("tokenizer.json", "has a damaged post_processor")
                side.append(pair[1])
    return Around(tuple(first), tuple(last))


def _template(sources: Sources, step: dict[str, Any], first: list[int], last: list[int]) -> None:
    side = first
    known, pieces = step.get("special_tokens"), step.get("single") or []
    if not isinstance(pieces, list):
        raise sources.wrong("tokenizer.json", "has a damaged post_processor")
    for piece in pieces:
        if isinstance(piece, dict) and "Sequence" in piece:
            side = last
            continue
        try:
            ids = known[piece["SpecialToken"]["id"]]["ids"]  # type: ignore[index]
        except (KeyError, TypeError):
            ids = None
        if not isinstance(ids, list) or not all(type(one) is int for one in ids):
            raise sources.wrong("tokenizer.json", "has a damaged post_processor")
        side.extend(ids)


def around_keys(
    found: Around, special: dict[str, int], texts: list[str]
) -> tuple[dict[str, GGUFValue], list[str]]:
    """Return all keys about special tokens (of `special_keys`), and what they cannot say."""
    special, notes, keys = dict(special), [], {}
    for kind, ids, side in (("bos", found.first, "before"), ("eos", found.last, "after")):
        adds = len(ids) == 1 and 0 <= ids[0] < len(texts)
        if ids and not adds:
            notes.append(
                f"the tokenizer puts {len(ids)} tokens {side} a text, llama.cpp at most one: it "
                "will put none"
            )
        if adds and special.get(kind, ids[0]) != ids[0]:
            notes.append(
                f"{printable(texts[ids[0]])}, which the tokenizer puts {side} a text, takes the "
                f"place of {printable(texts[special[kind]])} as {kind} token"
            )
        if adds:
            special[kind] = ids[0]
        keys[f"tokenizer.ggml.add_{kind}_token"] = GGUFValue.flag(adds)
    return number_keys(special) | keys, notes


def number_keys(special: dict[str, int]) -> dict[str, GGUFValue]:
    """Return the keys of the special tokens' numbers."""
    return {
        f"tokenizer.ggml.{NAMES[kind]}_token_id": GGUFValue.uint(number)
        for kind, number in special.items()
    }
