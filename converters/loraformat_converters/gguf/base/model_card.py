"""Conversion between GGUF metadata and model card front matter.

Licence, name, languages, tags and the models that it was made of are ``general.*`` in a GGUF file;
beside safetensors they are the front matter of ``README.md``, under the names that llama.cpp's own
converter reads there. Anybody may have written either: texts are bounded, and what is no text is
passed over.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from loraformat.card.front_matter import compose, split
from loraformat.errors import InputError, printable
from loraformat.model.checkpoint import CarriedFile
from loraformat.storage.safe_paths import CARD_NAME
from loraformat_converters.gguf.container.values import GGUFValue

if TYPE_CHECKING:
    from loraformat_converters.gguf.container.reader import GGUFFile

__all__ = ["card_file", "card_keys", "left_out", "model_name", "without_place"]

_NAME = "general.name"
#: Member of the front matter, by key.
_TEXTS = {
    _NAME: "model_name",
    "general.license": "license",
    "general.license.name": "license_name",
    "general.license.link": "license_link",
    "general.author": "author",
    "general.version": "version",
    "general.organization": "organization",
    "general.description": "description",
    "general.finetune": "finetune",
    "general.basename": "basename",
    "general.size_label": "size_label",
}
_LISTS = {"general.tags": "tags", "general.languages": "language"}
_BASES = "general.base_model"
#: What says how the file is made, or where it lay, and nothing of another form of the model.
_OF_THE_FILE = re.compile(
    r"general\.(architecture|type|file_type|quantization_version|quantized_by|alignment"
    r"|source\..*|base_model\..*)"
)
_LONGEST, _MOST, _MOST_CARD_BYTES = 4096, 64, 4 << 20
_HUB = re.compile(r"https://huggingface\.co/([\w.-]+/[\w.-]+)/?")


def card_file(gguf: GGUFFile, *, ours: bool) -> tuple[CarriedFile, ...]:
    """Return ``README.md`` with what a file says of its model; nothing if it says nothing.

    Of a file that was made here the name alone, which is that of a directory, makes no card.
    """
    found: dict[str, Any] = {member: _text(_said(gguf, key)) for key, member in _TEXTS.items()}
    found |= {member: _listed(_said(gguf, key)) for key, member in _LISTS.items()}
    found["base_model"] = _bases(gguf)
    fields = {member: value for member, value in found.items() if value}
    if not fields or (ours and fields.keys() <= {"model_name"}):
        return ()
    title = printable(fields.get("model_name", "Model"))
    return (CarriedFile.of(CARD_NAME, f"{compose(fields)}\n# {title}\n".encode()),)


def left_out(gguf: GGUFFile) -> tuple[str, ...]:
    """Return a sentence with the keys of the model as such that have no place in a directory."""
    known = {*_TEXTS, *_LISTS}
    keys = [
        key for key in gguf.metadata
        if key.startswith("general.") and key not in known and not _OF_THE_FILE.fullmatch(key)
    ]  # fmt: skip
    return (f"metadata {', '.join(map(printable, keys[:8]))}",) if keys else ()


def card_keys(files: Iterable[CarriedFile]) -> dict[str, GGUFValue]:
    """Return the keys that a card's front matter gives, without the name."""
    fields = _front(files)
    keys = {
        key: GGUFValue.text(text)
        for key, member in _TEXTS.items()
        if key != _NAME and (text := _text(fields.get(member)))
    }
    for key, member in _LISTS.items():
        texts = _listed(fields.get(member) or fields.get("languages" if "lang" in member else ""))
        if key == "general.tags":
            texts += [tag for tag in _listed(fields.get("pipeline_tag")) if tag not in texts]
        if texts:
            keys[key] = GGUFValue.texts(texts)
    return keys | _base_keys(_listed(fields.get("base_model")))


def model_name(files: Iterable[CarriedFile]) -> str | None:
    """Return the model's name by its card."""
    return _text(_front(files).get("model_name"))


def without_place(files: Iterable[CarriedFile]) -> list[str]:
    """Return a note that names files which have no place in a GGUF file, if there are any."""
    names = [
        f"{file.path} (its front matter is kept)" if file.path == CARD_NAME else file.path
        for file in files
        if re.fullmatch(r"README\.md|(LICEN[CS]E|NOTICE|USE_POLICY)[\w.-]*", file.path)
    ]
    if not names:
        return []
    return [f"not in the GGUF file; publish separately: {', '.join(map(printable, names))}"]


def _said(gguf: GGUFFile, key: str) -> object:
    value = gguf.metadata.get(key)
    return None if value is None else value.value


def _text(value: object) -> str | None:
    if not isinstance(value, str) or not 0 < len(value.strip()) <= _LONGEST:
        return None
    return value.strip()


def _listed(value: object) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [text for text in map(_text, values[:_MOST]) if text is not None]


def _front(files: Iterable[CarriedFile]) -> Mapping[str, Any]:
    for file in files:
        if file.path == CARD_NAME and file.nbytes <= _MOST_CARD_BYTES:
            try:
                return split(file.read().decode("utf-8"))[0]
            except (InputError, UnicodeDecodeError):  # what the Hub would not read either
                return {}
    return {}


def _bases(gguf: GGUFFile) -> list[str]:
    found = []
    for number in range(_MOST):
        url = _text(_said(gguf, f"{_BASES}.{number}.repo_url"))
        if url is None:
            break
        match = _HUB.fullmatch(url)
        found.append(match[1] if match else url)
    return found


def _base_keys(bases: list[str]) -> dict[str, GGUFValue]:
    if not bases:
        return {}
    keys = {f"{_BASES}.count": GGUFValue.uint(len(bases))}
    for number, base in enumerate(bases):
        organization, slash, name = base.rpartition("/")
        hub = bool(slash) and "/" not in organization
        url = f"https://huggingface.co/{base}" if hub else base
        texts = {"name": name, "repo_url": url}
        if hub:
            texts["organization"] = organization
        keys |= {f"{_BASES}.{number}.{what}": GGUFValue.text(text) for what, text in texts.items()}
    return keys
