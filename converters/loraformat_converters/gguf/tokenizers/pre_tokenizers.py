r"""Recognition of pre-tokenizers, with llama.cpp's names.

llama.cpp has no pre-tokenizer language: each name stands for regular expressions in its
source (``src/llama-vocab.cpp``). Its own converter finds the name by the hash of a test text's
tokens; here the definition itself is compared, step by step, with the table below.

Steps are tuples: ``("regex", PATTERN)`` is a Split that isolates the matches, ``("gpt2",)`` a
ByteLevel with its own regex, ``("digits", INDIVIDUALLY)`` and ``("punctuation", BEHAVIOR)``
those of the tokenizers library. A ByteLevel without a regex ends every list and is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from loraformat_converters.gguf.tokenizers.sources import steps_in

__all__ = ["NAMES", "PreTokenizer", "by_name", "described", "recognised", "steps_of"]

Step = tuple[Any, ...]

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SUFFIX = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_END = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_LLAMA3 = rf"{_SUFFIX}|{_WORD}|\p{{N}}{{1,3}}|{_SIGNS}{_END}"
_QWEN2 = rf"{_SUFFIX}|{_WORD}|\p{{N}}|{_SIGNS}{_END}"
_QWEN35 = _SUFFIX + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*" + _END
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = [rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}{a}{_LOWER}{b}" for a, b in (("*", "+"), ("+", "*"))]
_SLASHED = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_TEKKEN = rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}|{_SLASHED}{_END}"
_GPT4O = rf"{_CASED[0]}{_SUFFIX}?|{_CASED[1]}{_SUFFIX}?|\p{{N}}{{1,3}}|{_SLASHED}{_END}"
_BLOOM = " ?[^(\\s|[.,!?…。，、।۔،])]+"
_CJK = "[一-龥぀-ゟ゠-ヿ]+"
_DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*" + _END
)
_ASCII_CASED = "Outside ASCII llama.cpp knows no upper and lower case in this pre-tokenizer"


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """One way to cut a text.

    Attributes
    ----------
    names : tuple of str
        llama.cpp's, the one that is written first.
    steps : tuple of Step
    ignore_merges : bool
        Whether llama.cpp takes a word that is a token as it is, under these names.
    normalizer : str or None
        ``"NFC"``: what such tokenizers do before. llama.cpp does not.
    approximate : str or None
        Where llama.cpp's regex is known to differ from the definition.
    """

    names: tuple[str, ...]
    steps: tuple[Step, ...]
    ignore_merges: bool = False
    normalizer: str | None = None
    approximate: str | None = None


TABLE = (
    PreTokenizer(
        ("gpt-2", "phi-2", "jina-es", "jina-de", "gigachat", "jina-v2-es", "jina-v2-de", "a.x-4.0",
         "mellum", "modern-bert", "jina-v1-en", "jina-v2-code", "roberta-bpe", "mpt", "olmo",
         "jais", "trillion", "granite-docling", "exaone4"),
        (("gpt2",),),
    ),
    PreTokenizer(
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2",
         "jina-v5-nano", "glm4", "glm5"),
        (("regex", _LLAMA3),),
        ignore_merges=True,
    ),
    PreTokenizer(("smaug-bpe", "dbrx", "chatglm-bpe"), (("regex", _LLAMA3),)),
    PreTokenizer(
        ("qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "stablelm2", "hunyuan",
         "solar-open", "grok-2"),
        (("regex", _QWEN2),),
        normalizer="NFC",
    ),
    PreTokenizer(("qwen35",), (("regex", _QWEN35),), normalizer="NFC"),
    PreTokenizer(
        ("tekken",), (("regex", _TEKKEN),), ignore_merges=True, approximate=_ASCII_CASED
    ),
    PreTokenizer(
        ("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"),
        (("regex", _GPT4O),),
        approximate=_ASCII_CASED,
    ),
    PreTokenizer(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b",
         "mellum2"),
        (("digits", True), ("gpt2",)),
    ),
    PreTokenizer(
        ("falcon",),
        (("punctuation", "Contiguous"), ("gpt2",), ("digits", False), ("regex", "[0-9][0-9][0-9]")),
    ),
    PreTokenizer(("bloom", "poro-chat", "gpt3-finnish"), (("regex", _BLOOM),)),
    PreTokenizer(("viking",), (("regex", _BLOOM), ("digits", True))),
    PreTokenizer(
        ("deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"),
        (("regex", r"\p{N}{1,3}"), ("regex", _CJK), ("regex", _DEEPSEEK3)),
    ),
    PreTokenizer(
        ("minicpm5",),
        (("regex", r"\p{N}{1,3}"), ("regex", rf"{_SUFFIX}|{_WORD}|\p{{N}}+|{_SIGNS}{_END}")),
        ignore_merges=True,
    ),
    PreTokenizer(
        ("seed-coder",),
        (("regex", rf"{_SUFFIX}|{_WORD}|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+{_END}"),),
    ),
    PreTokenizer(("ufakzeka",), (("regex", rf"{_WORD}|\p{{N}}|{_SIGNS}{_END}"),)),
    PreTokenizer(
        ("bailingmoe", "bailingmoe2", "llada-moe"),
        (("regex", r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++"
                   r"[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"),),
    ),
)  # fmt: skip

#: Names that llama.cpp knows and whose definition in ``tokenizer.json`` is not supported.
_UNDEFINED = (
    "default", "deepseek-llm", "deepseek-coder", "jais-2", "spark2_5", "youtu", "chameleon",
    "granite-embed-multi-97m", "tiny_aya", "cohere2moe", "superbpe", "kimi-k2", "afmoe", "laguna",
    "exaone-moe", "k2-horizon",
)  # fmt: skip
_BY_NAME = {name: one for one in TABLE for name in one.names}
#: All names for byte-level BPE.
NAMES = tuple(sorted([*_BY_NAME, *_UNDEFINED]))
#: Other spellings of the same regex.
_SPELLINGS = (
    ("\r", r"\r"),
    ("\n", r"\n"),
    ("(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])", _SUFFIX),
    ("(?i:'s|'t|'re|'ve|'m|'ll|'d|'ll)", _SUFFIX),
    (r'[!"#$%', r"[!\"#$%"),
)


def by_name(name: str) -> PreTokenizer | None:
    """Return what a name of llama.cpp's stands for, None if that is not known."""
    return _BY_NAME.get(name)


def recognised(steps: tuple[Step, ...], ignore_merges: bool) -> PreTokenizer | None:
    """Return the entry for these steps, best one that treats merges alike.

    Examples
    --------
    >>> recognised((("gpt2",),), False).names[0]
    'gpt-2'
    >>> recognised((("regex", ".*"),), False) is None
    True
    """
    same = [one for one in TABLE if _spelled(one.steps) == _spelled(steps)]
    return min(same, key=lambda one: one.ignore_merges != ignore_merges, default=None)


def _spelled(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    return tuple(
        ("regex", _pattern(step[1])) if step[0] == "regex" else step
        for step in (("regex", _GPT2) if one == ("gpt2",) else one for one in steps)
    )


def _pattern(pattern: str) -> str:
    for one, other in _SPELLINGS:
        pattern = pattern.replace(one, other)
    return pattern


def steps_of(definition: Any) -> tuple[Step, ...] | None:
    """Return the steps of a ``pre_tokenizer``, None if one has no equal in llama.cpp.

    Examples
    --------
    >>> steps_of({"type": "ByteLevel", "add_prefix_space": False, "use_regex": True})
    (('gpt2',),)
    >>> steps_of({"type": "Whitespace"}) is None
    True
    """
    flat = steps_in(definition, "pretokenizers")
    steps: list[Step] = []
    bytes_at = None
    for number, one in enumerate(flat):
        step = _step(one)
        if step is None:
            return None
        if step[0] in ("bytes", "gpt2"):
            bytes_at = number
        if step[0] != "bytes":
            steps.append(step)
        elif number != len(flat) - 1:
            return None
    return tuple(steps) if bytes_at is not None else None


def _step(one: Any) -> Step | None:
    if not isinstance(one, dict):
        return None
    kind = one.get("type")
    if kind == "ByteLevel" and one.get("add_prefix_space", True) is False:
        return ("gpt2",) if one.get("use_regex", True) else ("bytes",)
    if kind == "Digits":
        return ("digits", one.get("individual_digits") is True)
    if kind == "Punctuation":
        return ("punctuation", one.get("behavior", "Isolated"))
    if kind == "Split":
        pattern = one.get("pattern")
        text = pattern.get("Regex") if isinstance(pattern, dict) else None
        cut = (one.get("behavior"), one.get("invert", False))
        # What does not match is dropped by the second form, and nothing is where \s+ is last.
        whole = isinstance(text, str) and text.endswith(r"|\s+")
        if isinstance(text, str) and (
            cut == ("Isolated", False) or (cut == ("Removed", True) and whole)
        ):
            return ("regex", text)
    return None


def described(pre: PreTokenizer) -> dict[str, Any]:
    """Return the definition for ``tokenizer.json``."""
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    found: list[dict[str, Any]] = []
    for step in pre.steps:
        if step[0] == "gpt2":
            found.append({**level, "use_regex": True})
        elif step[0] == "digits":
            found.append({"type": "Digits", "individual_digits": step[1]})
        elif step[0] == "punctuation":
            found.append({"type": "Punctuation", "behavior": step[1]})
        else:
            found.append({"type": "Split", "pattern": {"Regex": step[1]}, "behavior": "Isolated",
                          "invert": False})  # fmt: skip
    if ("gpt2",) not in pre.steps:
        found.append({**level, "use_regex": False})
    return found[0] if len(found) == 1 else {"type": "Sequence", "pretokenizers": found}
