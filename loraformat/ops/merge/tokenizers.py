"""Chat template and stop tokens of merged adapters, which the merged model takes along.

An adapter that was trained on conversations lies beside the chat template that it was trained
with, if that was not the base's, and beside a ``generation_config.json`` with the tokens that end
its turns. What prompts the merged model with another template gets less than was trained.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from loraformat.model.adapter import Adapter
from loraformat.model.checkpoint import CarriedFile
from loraformat.model.config_json import encode
from loraformat.model.tokenizer_files import CarriedTokenizer

__all__ = ["still_prompted_by", "with_conversation"]

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
    """Say of which adapter the template is that a model keeps after it was taken out of it.

    Parameters
    ----------
    files : sequence of CarriedFile
        The merged model's.
    adapters : iterable of Adapter
        That were merged into it.
    """
    there = _template(files)
    for adapter in adapters:
        own = _template(adapter.files)
        if there is not None and own is not None and _same(own, there):
            return [
                f"the chat template is still that of {adapter.path}: if the base has another, "
                "copy it, and generation_config.json, over the output's"
            ]
    return []


def _other_tokenizers(files: Sequence[CarriedFile], adapters: list[Adapter]) -> list[str]:
    """Say whose tokenizer gives other tokens than the one that is kept."""
    from loraformat.ops.check.prompts import tokenizer_change

    base = CarriedTokenizer(files, "")
    notes = []
    for adapter in adapters:
        own = CarriedTokenizer(adapter.files, adapter.path)
        if own.has(_TOKENIZER) and not _equal(_TOKENIZER, own, base):
            change = tokenizer_change(own, base)
            notes += [] if change is None else [f"{adapter.path}: {change}; the base's is kept"]
    return notes


def _equal(name: str, one: CarriedTokenizer, other: CarriedTokenizer) -> bool:
    if not other.has(name) or one.size(name) != other.size(name):
        return False
    return one.bytes(name) == other.bytes(name)


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
        if not _same(text, template)
    ]
    if before is not None and _same(before, template):
        return files, notes
    said = "replaces the base's" if before is not None else "the base had none"
    notes.insert(0, f"the chat template is that of {adapter.path}, trained with it; {said}")
    data = template.encode("utf-8")
    new = CarriedFile(_TEMPLATE, len(data), lambda: data)
    kept = (file for file in files if file.path not in (_TEMPLATE, _OLD_TEMPLATE))
    return (*map(_without_template, kept), new), notes


def _template(files: Iterable[CarriedFile]) -> str | None:
    return CarriedTokenizer(files, "").chat_templates.get("default")


def _same(one: str, other: str) -> bool:
    return one.rstrip("\n") == other.rstrip("\n")  # which the template's language drops


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
    data = encode(fields)
    return CarriedFile(path, len(data), lambda: data)
