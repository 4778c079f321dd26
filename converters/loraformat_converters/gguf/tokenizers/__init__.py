"""Tokenizers: Hugging Face files to ``tokenizer.ggml.*``, and back.

`read` and `files` are all that the rest of the house asks for. Which room is entered depends
on ``model.type`` of ``tokenizer.json`` one way and on ``tokenizer.ggml.model`` the other way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loraformat.checkpoint import CarriedFile, Checkpoint
from loraformat.errors import LoraFormatError, printable
from loraformat_converters.gguf.tokenizers import bpe
from loraformat_converters.gguf.tokenizers.chat import template_keys
from loraformat_converters.gguf.tokenizers.sources import Sources
from loraformat_converters.gguf.tokenizers.special import around, around_keys, special_keys
from loraformat_converters.gguf.tokenizers.written import Tokens, tokenizer_files
from loraformat_converters.gguf.values import GGUFValue

if TYPE_CHECKING:
    from loraformat_converters.gguf.container import GGUFFile

__all__ = ["Tokenizer", "TokenizerFiles", "files", "read"]

_HINT = "put tokenizer.json beside the weights; a tokenizer.model alone cannot be converted yet"


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """A tokenizer as a GGUF file keeps it.

    Attributes
    ----------
    keys : dict of str to GGUFValue
    notes : list of str
        Where llama.cpp will do something else than transformers.
    """

    keys: dict[str, GGUFValue]
    notes: list[str]


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """A tokenizer as transformers reads it.

    Attributes
    ----------
    files : tuple of CarriedFile
        None where it cannot be made.
    missing : str or None
        Why it cannot.
    """

    files: tuple[CarriedFile, ...]
    missing: str | None = None


def read(checkpoint: Checkpoint, *, vocabulary: int, pre: str | None = None) -> Tokenizer:
    """Return the keys that describe a model's tokenizer.

    Parameters
    ----------
    checkpoint : Checkpoint
        Its carried files hold the tokenizer.
    vocabulary : int
        Rows of the embedding: as many tokens are written, the last of them unused.
    pre : str, optional
        llama.cpp's name of the pre-tokenizer, where it shall not be recognised.

    Raises
    ------
    UnsupportedError
        If there is no tokenizer, or llama.cpp has none like it.
    InputError
        If its files are damaged.
    UsageError
        If ``pre`` is no name that llama.cpp knows.
    """
    sources = Sources(checkpoint)
    try:
        return _read(sources, vocabulary, pre)
    except LoraFormatError as error:
        error.path = error.path or str(checkpoint.path)
        raise


def _read(sources: Sources, rows: int, pre: str | None) -> Tokenizer:
    if not sources.has("tokenizer.json"):
        raise sources.refused(
            "has no tokenizer.json, which llama.cpp's file is made of", hint=_HINT
        )
    model = sources.tokenizer.get("model")
    kind = model.get("type") if isinstance(model, dict) else None
    if kind == "BPE":
        keys, found, notes = bpe.to_gguf(sources, rows, pre)
    else:
        raise sources.refused(
            f"the tokenizer is of type {printable(str(kind))}, and only byte-level BPE can be "
            "converted yet"
        )
    special = special_keys(sources, found.numbers(), rows)
    more, said = around_keys(around(sources, special), special, found.texts)
    keys |= more | template_keys(sources)
    return Tokenizer(keys, notes + said + found.notes())


def files(gguf: GGUFFile) -> TokenizerFiles:
    """Return the tokenizer files that transformers reads, made from a file's metadata.

    Raises
    ------
    InputError
        If the metadata is damaged.
    """
    kind = gguf.text("tokenizer.ggml.model", "none")
    if kind not in ("gpt2",) or "tokenizer.ggml.tokens" not in gguf.metadata:
        return TokenizerFiles((), f"tokenizer files (none are known for {printable(kind)})")
    tokens = Tokens(gguf)
    made: dict[str, Any] | str
    tokens.around(gguf, bos=gguf.text("tokenizer.ggml.pre", "default") in _ADDS_BOS)
    made = bpe.from_gguf(gguf, tokens)
    if isinstance(made, str):
        return TokenizerFiles((), made)
    return TokenizerFiles(tokenizer_files(gguf, tokens, made))


#: Where llama.cpp puts the first token if the file does not say.
_ADDS_BOS = ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0",
             "lfm2", "jina-v5-nano", "tekken", "chameleon")  # fmt: skip
