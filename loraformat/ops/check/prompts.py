"""Differences between an adapter's tokenizer files and its base's.

Runtimes take the base's. What is held against each other is what decides about the numbers that
a model sees: the tokens with their numbers, the merges, first and last tokens, and the chat
templates. How a file says it is not, for the same tokenizer is written anew by every version of
the libraries, and by a conversion from GGUF.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from loraformat.errors import printable
from loraformat.model.checkpoint import CarriedFile
from loraformat.model.tokenizer_files import CarriedTokenizer
from loraformat.storage.safe_directory import SafeDirectory

__all__ = [
    "same_file", "same_template", "template_change", "token_numbers", "tokenizer_beside",
    "tokenizer_change",
]  # fmt: skip

_MAX_BYTES = 128 << 20
_NAMES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_MODEL = "tokenizer.model"
_ROLES = {"bos": "begins texts with", "eos": "ends texts with"}


def tokenizer_beside(adapter: Path) -> CarriedTokenizer:
    """Return the tokenizer files in an adapter's directory; a single file has none."""
    files = []
    if adapter.is_dir():
        folder = SafeDirectory(adapter)
        for name in filter(folder.has, _NAMES):
            read = partial(folder.read, name, _MAX_BYTES)
            files.append(CarriedFile(name, folder.size(name), read))
    return CarriedTokenizer(files, adapter)


def tokenizer_change(
    ours: CarriedTokenizer, base: CarriedTokenizer, whose: str = "the base's"
) -> str | None:
    """Describe where token ids differ from those of the base's tokenizer.

    Parameters
    ----------
    ours : CarriedTokenizer
        The adapter's.
    base : CarriedTokenizer
    whose : str
        What the sentence calls that one.

    Returns
    -------
    str or None
        A sentence without a full stop; None if nothing is different, or known.

    Raises
    ------
    InputError
        If a file is damaged.
    """
    return _vocabulary(ours, base, whose) or _merges(ours, base) or _roles(ours, base, whose)


def template_change(ours: CarriedTokenizer, base: CarriedTokenizer) -> str | None:
    """Describe how the chat template differs from the base's; as `tokenizer_change`."""
    there = base.chat_templates
    for name, text in ours.chat_templates.items():
        called = "" if name == "default" else f" {printable(name)}"
        if name not in there:
            return f"has its own chat template{called}, but its base has none"
        if not same_template(text, there[name]):
            return f"has another chat template{called} than its base's"
    return None


def token_numbers(tokenizer: CarriedTokenizer) -> dict[str, object]:
    """Return the id of each token; empty if no readable file has it.

    Examples
    --------
    >>> file = CarriedFile("vocab.json", 10, lambda: b'{"a": 0}')
    >>> token_numbers(CarriedTokenizer([file], "my-model"))
    {'a': 0}
    """
    vocabulary = _model(tokenizer).get("vocab", tokenizer.json("vocab.json"))
    if isinstance(vocabulary, list):  # of pieces with scores
        firsts = (piece[0] if isinstance(piece, list) and piece else None for piece in vocabulary)
        vocabulary = {str(first): number for number, first in enumerate(firsts)}
    if not vocabulary and tokenizer.has("vocab.txt"):
        lines = tokenizer.bytes("vocab.txt").decode("utf-8", "replace").splitlines()
        vocabulary = {line: number for number, line in enumerate(lines)}
    if not isinstance(vocabulary, dict) or not vocabulary:
        return {}
    added = tokenizer.tokenizer.get("added_tokens")
    listed = [one for one in added if isinstance(one, dict)] if isinstance(added, list) else []
    more = {str(one.get("content")): one.get("id") for one in listed}
    return {**vocabulary, **tokenizer.json("added_tokens.json"), **more}


def _vocabulary(ours: CarriedTokenizer, base: CarriedTokenizer, whose: str) -> str | None:
    here, there = token_numbers(ours), token_numbers(base)
    if not here or not there:
        both = ours.has(_MODEL) and base.has(_MODEL)
        return f"its {_MODEL} is another" if both and not same_file(_MODEL, ours, base) else None
    new = [text for text in here if text not in there]
    if new:
        more = f" and {len(new) - 1} more" if len(new) > 1 else ""
        return f"its tokenizer has {printable(new[0])}{more}, which {whose} has not"
    for text, number in here.items():
        if there[text] != number:
            return (
                f"its tokenizer gives {printable(text)} the number {printable(number)}, and "
                f"{whose} {printable(there[text])}"
            )
    return None


def _merges(ours: CarriedTokenizer, base: CarriedTokenizer) -> str | None:
    here, there = (_model(tokenizer).get("merges") for tokenizer in (ours, base))
    if not isinstance(here, list) or not isinstance(there, list):
        return None
    return "its tokenizer has different merges" if _pairs(here) != _pairs(there) else None


def _roles(ours: CarriedTokenizer, base: CarriedTokenizer, whose: str) -> str | None:
    for kind, does in _ROLES.items():
        here, there = ours.special.get(kind), base.special.get(kind)
        if here is not None and there is not None and here != there:
            return f"its tokenizer {does} {printable(here)}, and {whose} with {printable(there)}"
        adds = [t.config.get(f"add_{kind}_token") for t in (ours, base)]
        if {True, False} == {add for add in adds if isinstance(add, bool)}:
            who = "its tokenizer" if adds[0] else f"{whose} tokenizer"
            other = whose if adds[0] else "its own"
            return f"{who} adds a token where it {does.split()[0]} a text, and {other} does not"
    return None


def same_file(name: str, one: CarriedTokenizer, other: CarriedTokenizer) -> bool:
    """Tell whether two tokenizers have the same bytes in a file that both have."""
    return one.size(name) == other.size(name) and one.bytes(name) == other.bytes(name)


def same_template(one: str, other: str) -> bool:
    """Compare chat templates; what their language drops at the end is no difference."""
    return one.rstrip("\n") == other.rstrip("\n")


def _model(tokenizer: CarriedTokenizer) -> dict[str, Any]:
    found = tokenizer.tokenizer.get("model")
    return found if isinstance(found, dict) else {}


def _pairs(merges: list[Any]) -> list[Any]:
    """Return BPE merges in the older of their two notations."""
    return [" ".join(map(str, pair)) if isinstance(pair, list) else pair for pair in merges]
