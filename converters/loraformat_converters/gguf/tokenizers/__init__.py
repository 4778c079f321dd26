"""Tokenizers: Hugging Face files to ``tokenizer.ggml.*``, and back.

`metadata` and `files` are all that the rest of the house asks for. So far byte-level BPE from
``tokenizer.json`` is known.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraformat.checkpoint import CarriedFile, Checkpoint
from loraformat_converters.gguf.tokenizers import bpe
from loraformat_converters.gguf.values import GGUFValue

if TYPE_CHECKING:
    from loraformat_converters.gguf.container import GGUFFile

__all__ = ["files", "metadata"]


def metadata(
    checkpoint: Checkpoint, *, vocabulary: int, pre: str | None = None
) -> dict[str, GGUFValue]:
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
    """
    return bpe.metadata(checkpoint, vocabulary=vocabulary, pre=pre)


def files(gguf: GGUFFile) -> tuple[CarriedFile, ...]:
    """Return the tokenizer files that transformers reads, made from a file's metadata."""
    return bpe.files(gguf)
