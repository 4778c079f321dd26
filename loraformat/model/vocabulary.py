"""Tensors with a row per token, and resizing the vocabulary.

As transformers' ``resize_token_embeddings`` does it: rows are cut off at the end, or added there
with the mean of those that are there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy

from loraformat.algebra.row_tiles import row_tiles
from loraformat.model.checkpoint import CarriedFile, LazyTensor
from loraformat.model.config_json import encode, parse
from loraformat.tensors.arrays import Array

__all__ = [
    "Resize", "is_per_token", "per_token", "resized", "resized_config", "tokenizer_files",
    "with_tokenizer",
]  # fmt: skip

_PER_TOKEN = re.compile(
    r"(^|\.)((embed_tokens|wte|word_embeddings|embed_in|lm_head|embed_out)\.weight"
    r"|(lm_head|embed_out)\.bias)$"
)
_OTHER_TOWERS = re.compile(r"(^|[._])(vision|visual|audio|image)")
_SUMMED_ELEMENTS = 1 << 20

#: Without one of these the other files are no tokenizer.
_VOCABULARIES = {"tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model"}
_TOKENIZER = re.compile(
    r"(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|chat_template)\.json"
    r"|(tokenizer|spiece)\.model|vocab\.txt|merges\.txt|chat_template\.jinja"
    r"|(additional_chat_templates|chat_templates)/[^/]+\.jinja"
)


class Resize(NamedTuple):
    """A change of the number of tokens, the rows of the embedding."""

    before: int
    after: int


def is_per_token(name: str) -> bool:
    """Tell by its name whether a tensor has a row per token.

    Examples
    --------
    >>> is_per_token("model.embed_tokens.weight"), is_per_token("model.norm.weight")
    (True, False)
    """
    return bool(_PER_TOKEN.search(name)) and not _OTHER_TOWERS.search(name)


def per_token(tensors: Mapping[str, LazyTensor]) -> dict[str, int]:
    """Return the tensors with a row per token, and their number of rows.

    Those are the embedding of a language model, its head, and the head's bias.

    Examples
    --------
    >>> per_token({})
    {}
    """
    return {
        name: tensor.shape[0]
        for name, tensor in tensors.items()
        if is_per_token(name) and tensor.shape
    }


def resized(values: Array, rows: int) -> Array:
    """Return a tensor, whose first dimension is the token, with another number of rows.

    The first rows stay as they are; what is new is the mean of all that were there, summed in
    float64 and rounded to the dtype, to nearest even.

    Examples
    --------
    >>> resized(numpy.array([[1.0, 2.0], [3.0, 6.0]]), 3)
    array([[1., 2.],
           [3., 6.],
           [2., 4.]])
    """
    before = len(values)
    if rows <= before:
        return values[:rows]
    grown = numpy.empty((rows, *values.shape[1:]), values.dtype)
    grown[:before] = values
    total = numpy.zeros(values.shape[1:])
    for start, stop in row_tiles(before, total.size, _SUMMED_ELEMENTS):
        total += values[start:stop].sum(0, dtype=numpy.float64)
    grown[before:] = total / max(before, 1)
    return grown


def resized_config(config: bytes, change: Resize) -> bytes:
    r"""Return ``config.json`` with another ``vocab_size``.

    Examples
    --------
    >>> resized_config(b'{"vocab_size": 8}', Resize(8, 9))
    b'{\n  "vocab_size": 9\n}\n'
    >>> parse(resized_config(b'{"text_config": {}, "model_type": "x"}', Resize(8, 9)))
    {'text_config': {'vocab_size': 9}, 'model_type': 'x'}
    """
    fields = parse(config)
    named = [part for part in _parts(fields) if part.get("vocab_size") == change.before]
    inner = fields.get("text_config")
    for part in named or [inner if isinstance(inner, dict) else fields]:
        part["vocab_size"] = change.after
    return encode(fields)


def _parts(fields: dict[str, Any]) -> Iterable[dict[str, Any]]:
    yield fields
    for name, value in fields.items():
        if isinstance(value, dict) and not _OTHER_TOWERS.search(name):
            yield from _parts(value)


def tokenizer_files(files: Iterable[CarriedFile]) -> tuple[CarriedFile, ...]:
    """Return the tokenizer files; empty if there is no vocabulary among them.

    Examples
    --------
    >>> names = ("README.md", "tokenizer_config.json", "tokenizer.json")
    >>> [f.path for f in tokenizer_files(CarriedFile(name, 0, bytes) for name in names)]
    ['tokenizer_config.json', 'tokenizer.json']
    """
    found = tuple(file for file in files if _TOKENIZER.fullmatch(file.path))
    return found if any(file.path in _VOCABULARIES for file in found) else ()


def with_tokenizer(
    files: Iterable[CarriedFile], tokenizer: tuple[CarriedFile, ...]
) -> tuple[CarriedFile, ...]:
    """Return files with the tokenizer replaced; unchanged if the new one is empty.

    Examples
    --------
    >>> old = (CarriedFile("vocab.json", 0, bytes), CarriedFile("LICENSE", 0, bytes))
    >>> new = (CarriedFile("tokenizer.json", 0, bytes),)
    >>> [file.path for file in with_tokenizer(old, new)]
    ['LICENSE', 'tokenizer.json']
    """
    kept = tuple(file for file in files if not (tokenizer and _TOKENIZER.fullmatch(file.path)))
    return (*kept, *tokenizer)
