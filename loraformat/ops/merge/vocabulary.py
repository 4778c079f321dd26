"""Which vocabulary adapters were trained for, and the tokenizer that belongs to it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from loraformat.errors import UnsupportedError, printable
from loraformat.model.adapter import Adapter
from loraformat.model.checkpoint import CarriedFile, Checkpoint, LazyTensor
from loraformat.model.tied_head import HEAD, TiedHead
from loraformat.model.tokenizer_files import CarriedTokenizer
from loraformat.model.vocabulary import (
    Resize,
    per_token,
    resized_config,
    tokenizer_files,
    with_tokenizer,
)

__all__ = ["brought_tokenizer", "resized_base", "tokens_without_rows", "wanted_size"]

#: Tokens up to which a low-rank delta alone, which is small however many it names, is believed.
_MOST_BY_DELTA = 1 << 20


def wanted_size(
    tensors: Mapping[str, LazyTensor], adapters: Sequence[Adapter], tied: TiedHead | None
) -> Resize | None:
    """Return how the base's vocabulary changes; None if it does not.

    An adapter says its number of tokens by the shapes of what it has for the embedding and the
    head: replacements, and deltas. One that has neither fits any vocabulary.

    Parameters
    ----------
    tensors : mapping of str to LazyTensor
        The base's.
    adapters : sequence of Adapter
    tied : TiedHead or None
        The base's.

    Raises
    ------
    UnsupportedError
        If adapters, or parts of one, are of different vocabularies.
    """
    before = _rows(tensors)
    if before is None:
        return None
    first: tuple[int, str, Adapter] | None = None
    for adapter in adapters:
        for name, rows in _sizes(tensors, adapter, tied):
            first = first or (rows, name, adapter)
            if rows == first[0]:
                continue
            other = "" if adapter is first[2] else f" of {first[2].path}"
            raise UnsupportedError(
                f"has {rows} tokens in {printable(name)}, and {first[0]} in "
                f"{printable(first[1])}{other}",
                path=adapter.path,
                hint="merge adapters of one vocabulary at a time"
                if other
                else "the file is damaged: save the adapter again",
            )
    return None if first is None or first[0] == before else Resize(before, first[0])


def _rows(tensors: Mapping[str, LazyTensor]) -> int | None:
    """Return the number of tokens of a base: the rows of its embedding, or else of its head."""
    found = sorted(per_token(tensors).items(), key=lambda item: "head" in item[0])
    return found[0][1] if found else None


def _sizes(
    tensors: Mapping[str, LazyTensor], adapter: Adapter, tied: TiedHead | None
) -> Iterator[tuple[str, int]]:
    known = per_token(tensors)

    def width(name: str) -> tuple[int, ...] | None:
        source = tied.embedding if tied and name.endswith(HEAD) and name not in tensors else name
        return tensors[source].shape[1:] if source in known else None

    for name, tensor in adapter.replacements.items():
        if tensor.shape and tensor.shape[1:] == width(name):
            yield name, tensor.shape[0]
    for name, delta in adapter.deltas.items():
        sizes = (delta.out_features, delta.in_features)
        rows, columns = sizes if delta.orientation == "linear" else sizes[::-1]
        if len(delta.a.shape) == 2 and (columns,) == width(name):
            if rows > _MOST_BY_DELTA and name not in adapter.replacements:
                raise UnsupportedError(
                    f"has a delta of {rows} tokens for {printable(name)}, wanted at most "
                    f"{_MOST_BY_DELTA} without the rows themselves",
                    path=adapter.path,
                    hint="save it with save_embedding_layers=True",
                )
            yield name, rows


def brought_tokenizer(
    adapters: Sequence[Adapter], resize: Resize
) -> tuple[tuple[CarriedFile, ...], str]:
    """Return the tokenizer of a vocabulary that adapters bring, and what is to be said of it.

    Parameters
    ----------
    adapters : sequence of Adapter
        That of the first that has one is taken.
    resize : Resize
    """
    change = f"the vocabulary is resized from {resize.before} to {resize.after} tokens"
    for adapter in adapters:
        if found := tokenizer_files(adapter.files):
            return found, f"{change}; the tokenizer is that of {adapter.path}"
    return (), (
        f"{change}, but the adapter has no tokenizer, so the base's is kept; add the tokenizer it "
        "was trained with to the adapter and merge again, or replace the one in the output"
    )


def tokens_without_rows(base: Checkpoint, adapters: Sequence[Adapter]) -> list[str]:
    """Say which adapters were trained with tokens that have no row in the base, nor in them.

    PEFT leaves embeddings out where it is told to, or cannot see that they were resized. What the
    base's own tokenizer has beyond its rows is the base's matter: Gemma 3's has a token for images.

    Parameters
    ----------
    base : Checkpoint
        Whose vocabulary stays as it is.
    adapters : sequence of Adapter

    Raises
    ------
    InputError
        If a tokenizer file is damaged.
    """
    from loraformat.ops.check.prompts import token_numbers

    rows = _rows(base.tensors)
    if rows is None:
        return []
    notes = []
    for adapter in adapters:
        numbers = token_numbers(CarriedTokenizer(adapter.files, adapter.path))
        beyond = [text for text, n in numbers.items() if type(n) is int and n >= rows]
        if beyond:
            known = token_numbers(CarriedTokenizer(base.files, base.path))
            beyond = [text for text in beyond if text not in known]
        if not beyond:
            continue
        more = f" and {len(beyond) - 1} more" if len(beyond) > 1 else ""
        notes.append(
            f"{adapter.path}: its tokenizer has {printable(beyond[0])}{more} beyond the {rows} "
            "tokens of the base, but the adapter has no rows for them, so they are not in the "
            "result; save it again with the embeddings, save_pretrained(OUT, "
            "save_embedding_layers=True), and merge that"
        )
    return notes


def resized_base(
    base: Checkpoint,
    resize: Resize,
    adapters: Sequence[Adapter],
    tensors: Mapping[str, LazyTensor],
) -> tuple[Checkpoint, str]:
    """Return a base of another vocabulary, with the config and the tokenizer of it.

    Parameters
    ----------
    base : Checkpoint
    resize : Resize
    adapters : sequence of Adapter
        Which may add the tokenizer.
    tensors : mapping of str to LazyTensor
        Those of the result.

    Returns
    -------
    Checkpoint
    str
        What is to be said.
    """
    tokenizer, note = brought_tokenizer(adapters, resize)
    config = None if base.config is None else resized_config(base.config, resize)
    files = with_tokenizer(base.files, tokenizer)
    return replace(base, tensors=tensors, config=config, files=files), note
