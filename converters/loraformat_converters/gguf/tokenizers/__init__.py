"""Conversion of tokenizers between Hugging Face files and ``tokenizer.ggml.*``.

`read` and `files` are all that is asked for from outside. Which file does the work depends on
``model.type`` of ``tokenizer.json`` one way and on ``tokenizer.ggml.model`` the other way.

Read `sources` and `vocabulary`, then `bpe` (with `pre_tokenizers`), `spm` (with `spaces` and
`merging`), `wordpiece`, or `sentencepiece_model` (with `protobuf` and `model_proto`) for
``tokenizer.model``; `special`, `turn_ends` and `chat` are for all of them, `written` for the way
back.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from loraformat.errors import LoraFormatError, UnsupportedError, UsageError, printable
from loraformat.model.checkpoint import CarriedFile, Checkpoint
from loraformat_converters.gguf.container.values import GGUFValue
from loraformat_converters.gguf.tokenizers import bpe, sentencepiece_model, spm, wordpiece
from loraformat_converters.gguf.tokenizers.chat import template_keys
from loraformat_converters.gguf.tokenizers.sources import Sources, stand_alone
from loraformat_converters.gguf.tokenizers.spaces import marks_spaces
from loraformat_converters.gguf.tokenizers.special import (
    around,
    around_keys,
    around_notes,
    by_config,
    special_keys,
)
from loraformat_converters.gguf.tokenizers.turn_ends import turn_end_keys
from loraformat_converters.gguf.tokenizers.vocabulary import Converted
from loraformat_converters.gguf.tokenizers.written import Tokens, tokenizer_files

if TYPE_CHECKING:
    from loraformat_converters.gguf.container.reader import GGUFFile

__all__ = ["Convert", "files", "read"]

_HINT = "put the tokenizer's files in the directory of the weights"


#: Makes a tokenizer llama.cpp's, with as many tokens as the embedding has rows. Raises
#: UnsupportedError if llama.cpp would cut texts otherwise, InputError if a file is damaged.
Convert = Callable[[Sources, int], Converted]


def read(
    checkpoint: Checkpoint, *, vocabulary: int, pre: str | None = None
) -> tuple[dict[str, GGUFValue], list[str]]:
    """Return the keys that describe a model's tokenizer, and where llama.cpp will do otherwise.

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


def _read(sources: Sources, rows: int, pre: str | None) -> tuple[dict[str, GGUFValue], list[str]]:
    kind, convert = _room(sources, pre)
    if kind != "byte-level BPE" and pre is not None:
        raise UsageError(
            f"--pre is for byte-level BPE, and the tokenizer is {kind}", hint="omit it"
        )
    found = convert(sources, rows)
    keys, notes = found.keys, found.notes
    special = special_keys(sources, found)
    if kind == "WordPiece":
        keys |= wordpiece.around_keys(sources, around(sources, special), special, rows)
    else:
        alone = kind == "tokenizer.model"
        sides = by_config(sources, special, bos=True) if alone else around(sources, special)
        texts = found.vocabulary.texts
        more, said = around_keys(sides, special, texts)
        keys, notes = keys | more, notes + said
        notes += [] if alone else around_notes(sources, sides, texts)
        eos = keys.get("tokenizer.ggml.eos_token_id")
        more, said = turn_end_keys(sources, None if eos is None else int(eos.value), texts)
        keys, notes = keys | more, notes + said
    return keys | template_keys(sources), notes + found.vocabulary.notes()


def _room(sources: Sources, pre: str | None) -> tuple[str, Convert]:
    """Return what a tokenizer is, and who converts it."""
    if not sources.has("tokenizer.json"):
        if sources.has(sentencepiece_model.FILE):
            return sentencepiece_model.FILE, sentencepiece_model.to_gguf
        if not stand_alone(sources):
            raise sources.refused(
                "has no tokenizer.json, no tokenizer.model and no vocab.json with merges.txt",
                hint=_HINT,
            )
    model = sources.tokenizer.get("model")
    model = model if isinstance(model, dict) else {}
    kind = model.get("type")
    if kind == "BPE":
        if model.get("byte_fallback") is True or marks_spaces(sources.tokenizer):
            return "SentencePiece", spm.to_gguf
        return "byte-level BPE", partial(bpe.to_gguf, pre=pre)
    if kind == "WordPiece":
        return "WordPiece", wordpiece.to_gguf
    raise sources.refused(
        f"the tokenizer is of type {printable(str(kind))}, and llama.cpp has byte-level BPE, "
        "SentencePiece BPE and WordPiece for these models"
    )


def files(gguf: GGUFFile) -> tuple[tuple[CarriedFile, ...], str | None]:
    """Return the tokenizer files that transformers reads, made from a file's metadata.

    None where they cannot be made; the second says why, or where they will cut texts otherwise.

    Raises
    ------
    InputError
        If the metadata is damaged.
    """
    kind = gguf.text("tokenizer.ggml.model", "none")
    if kind not in _SPECIAL_IDS or "tokenizer.ggml.tokens" not in gguf.metadata:
        return (), f"tokenizer files (none are known for {printable(kind)})"
    tokens = Tokens(gguf, _SPECIAL_IDS[kind])
    made: dict[str, Any] | str
    missing = None
    try:
        if kind == "gpt2":
            tokens.around(gguf, bos=gguf.text("tokenizer.ggml.pre", "default") in _ADDS_BOS)
            made = bpe.from_gguf(gguf, tokens)
        elif kind == "llama":
            tokens.around(gguf, bos=True)
            made, missing = spm.from_gguf(gguf, tokens)
        else:
            made = wordpiece.from_gguf(gguf, tokens)
    except UnsupportedError as error:  # the model can be had without
        made = f"tokenizer files ({error.problem})"
    if isinstance(made, str):
        return (), made
    return tokenizer_files(gguf, tokens, made), missing


#: By ``tokenizer.ggml.model``: special tokens where the file does not say.
_SPECIAL_IDS: dict[str, dict[str, int]] = {
    "gpt2": {},
    "llama": spm.SPECIAL_IDS,
    "bert": wordpiece.SPECIAL_IDS,
}
#: Where llama.cpp puts the first token if the file does not say.
_ADDS_BOS = ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0",
             "lfm2", "jina-v5-nano", "tekken", "chameleon")  # fmt: skip
