"""What merged adapters bring beside weights: vocabulary, tokenizer, chat template, stop tokens.

An adapter that was trained on conversations lies beside the chat template that it was trained
with, if that was not the base's, and beside a ``generation_config.json`` with the tokens that end
its turns. What prompts the merged model with another template gets less than was trained. One that
was trained with more tokens than the base has makes the base one of its vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from loraformat.errors import UnsupportedError, printable
from loraformat.model.adapter import Adapter
from loraformat.model.checkpoint import CarriedFile, Checkpoint, LazyTensor
from loraformat.model.config_json import encode
from loraformat.model.tied_head import HEAD, TiedHead
from loraformat.model.tokenizer_files import CarriedTokenizer
from loraformat.model.vocabulary import (
    Resize,
    per_token,
    resized_config,
    tokenizer_files,
    with_tokenizer,
)
from loraformat.ops.check.prompts import same_file, same_template, token_numbers, tokenizer_change

__all__ = [
    "resized_base", "still_prompted_by", "tokens_without_rows", "wanted_size", "with_conversation",
]  # fmt: skip

#: Tokens up to which a low-rank delta alone, which is small however many it names, is believed.
_MOST_BY_DELTA = 1 << 20
_TEMPLATE = "chat_template.jinja"
_OLD_TEMPLATE = "chat_template.json"
_CONFIG = "tokenizer_config.json"
_TOKENIZER = "tokenizer.json"
_GENERATION = "generation_config.json"


def with_conversation(
    files: Sequence[CarriedFile], adapters: Iterable[Adapter]
) -> tuple[tuple[CarriedFile, ...], list[str]]:
    """Return a base's files with the chat template and the last tokens of what is merged into it.

    Parameters
    ----------
    files : sequence of CarriedFile
        The base's.
    adapters : iterable of Adapter
        The first that brings a template, or tokens, decides.

    Returns
    -------
    files : tuple of CarriedFile
    notes : list of str
        What a user should know.

    Raises
    ------
    InputError
        If a file is damaged.
    """
    known = list(adapters)
    kept, notes = _with_template(tuple(files), known)
    kept, more = _with_stops(kept, known)
    return kept, [*notes, *more, *_other_tokenizers(kept, known)]


def still_prompted_by(files: Sequence[CarriedFile], adapters: Iterable[Adapter]) -> list[str]:
    """Say of which adapter the template is that a model keeps after it was taken out of it."""
    there = _template(files)
    for adapter in adapters:
        own = _template(adapter.files)
        if there is not None and own is not None and same_template(own, there):
            return [
                f"the chat template is still that of {adapter.path}: if the base has another, "
                "copy it, and generation_config.json, over the output's"
            ]
    return []


def _other_tokenizers(files: Sequence[CarriedFile], adapters: list[Adapter]) -> list[str]:
    """Say whose tokenizer gives other tokens than the one that is kept."""
    base = CarriedTokenizer(files, "")
    notes = []
    for adapter in adapters:
        own = CarriedTokenizer(adapter.files, adapter.path)
        if own.has(_TOKENIZER) and not (base.has(_TOKENIZER) and same_file(_TOKENIZER, own, base)):
            change = tokenizer_change(own, base)
            notes += [] if change is None else [f"{adapter.path}: {change}; the base's is kept"]
    return notes


def _with_template(
    files: tuple[CarriedFile, ...], adapters: list[Adapter]
) -> tuple[tuple[CarriedFile, ...], list[str]]:
    found = [(adapter, template) for adapter in adapters if (template := _template(adapter.files))]
    if not found:
        return files, []
    adapter, template = found[0]
    before = _template(files)
    notes = [
        f"{other.path}: its chat template differs from that of {adapter.path}, which is kept"
        for other, text in found[1:]
        if not same_template(text, template)
    ]
    if before is not None and same_template(before, template):
        return files, notes
    said = "replaces the base's" if before is not None else "the base had none"
    notes.insert(0, f"the chat template is that of {adapter.path}, trained with it; {said}")
    new = CarriedFile.of(_TEMPLATE, template.encode("utf-8"))
    kept = (file for file in files if file.path not in (_TEMPLATE, _OLD_TEMPLATE))
    return (*map(_without_template, kept), new), notes


def _template(files: Iterable[CarriedFile]) -> str | None:
    return CarriedTokenizer(files, "").chat_templates.get("default")


def _without_template(file: CarriedFile) -> CarriedFile:
    """Return a file that says no second template, which some programs would read."""
    if file.path != _CONFIG:
        return file
    fields = CarriedTokenizer([file], "").json(_CONFIG)
    named = fields.get("chat_template")
    if named is None:
        return file
    others = [one for one in named if isinstance(one, dict)] if isinstance(named, list) else []
    others = [one for one in others if one.get("name") != "default"]
    del fields["chat_template"]
    return _of_fields(_CONFIG, fields | ({"chat_template": others} if others else {}))


def _with_stops(
    files: tuple[CarriedFile, ...], adapters: list[Adapter]
) -> tuple[tuple[CarriedFile, ...], list[str]]:
    for adapter in adapters:
        learned = CarriedTokenizer(adapter.files, adapter.path).stops
        base = CarriedTokenizer(files, "")
        if not learned or not set(learned) - set(base.stops):
            continue
        fields = base.json(_GENERATION) | {"eos_token_id": learned}
        kept = (file for file in files if file.path != _GENERATION)
        ids = ", ".join(map(str, learned))
        note = f"texts end with the tokens {ids}, as {adapter.path} learned it"
        return (*kept, _of_fields(_GENERATION, fields)), [f"{note} ({_GENERATION})"]
    return files, []


def _of_fields(path: str, fields: dict[str, object]) -> CarriedFile:
    return CarriedFile.of(path, encode(fields))


def wanted_size(
    tensors: Mapping[str, LazyTensor], adapters: Sequence[Adapter], tied: TiedHead | None
) -> Resize | None:
    """Return the change of the base's vocabulary; None if there is none.

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
    """Return the number of tokens of a base: rows of its embedding or head."""
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


def _brought_tokenizer(
    adapters: Sequence[Adapter], resize: Resize
) -> tuple[tuple[CarriedFile, ...], str]:
    """Return the first tokenizer that adapters bring for a vocabulary, and what is said of it."""
    change = f"the vocabulary is resized from {resize.before} to {resize.after} tokens"
    for adapter in adapters:
        if found := tokenizer_files(adapter.files):
            return found, f"{change}; the tokenizer is that of {adapter.path}"
    return (), (
        f"{change}, but the adapter has no tokenizer, so the base's is kept; add the tokenizer it "
        "was trained with to the adapter and merge again, or replace the one in the output"
    )


def tokens_without_rows(base: Checkpoint, adapters: Sequence[Adapter]) -> list[str]:
    """Return notes on adapters with tokens that have no row in the base or in them.

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
    """Return a base with a resized vocabulary, its config and tokenizer.

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
    tokenizer, note = _brought_tokenizer(adapters, resize)
    config = None if base.config is None else resized_config(base.config, resize)
    files = with_tokenizer(base.files, tokenizer)
    return replace(base, tensors=tensors, config=config, files=files), note
