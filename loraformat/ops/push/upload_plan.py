"""The upload plan: files, card, base."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from loraformat import plugins
from loraformat.bundle.manifest import Manifest
from loraformat.bundle.reader import is_bundle
from loraformat.bundle.run_paths import CURVE_NAME
from loraformat.bundle.update import parse_bundle_slot, read_manifest
from loraformat.card import Base, Document, adapter_card, bundle_card, is_template
from loraformat.errors import LoraFormatError, UnsupportedError, UsageError
from loraformat.hub.source import download
from loraformat.model.config_json import CONFIG_NAME
from loraformat.ops.check.chats import chat_beside
from loraformat.ops.check.check import check
from loraformat.ops.convert.convert import convert
from loraformat.ops.info.adapter import description_of
from loraformat.ops.info.model import info
from loraformat.ops.info.report import AdapterInfo, ModelInfo
from loraformat.ops.opening.adapter import open_adapter
from loraformat.ops.push.base_info import NearBase, adapter_base, bundle_base, look_up, near_base
from loraformat.ops.push.card_facts import adapter_facts, bundle_facts
from loraformat.ops.push.files import Choice, Contents, UploadFile, adapter_files, bundle_files
from loraformat.plugins import Converter
from loraformat.runtimes.judge import obstacles
from loraformat.runtimes.task_usage import labels_of
from loraformat.shards.read_directory import peek_config
from loraformat.storage.safe_directory import SafeDirectory

__all__ = ["Parcel", "PushOptions", "gguf_file", "gguf_name", "gguf_pattern", "open_parcel"]

#: Files of an earlier push that belong to the weights, by what is pushed now.
_PEFT_FILES = (
    "adapter_model*.safetensors",
    "adapter_model.safetensors.index.json",
    "adapter_model.bin",
    "activation_statistics.safetensors",
    "training_record.json",
    CURVE_NAME,
)
_BUNDLE_FILES = ("*.safetensors", "model.safetensors.index.json", "adapters/*")


@dataclass(frozen=True, slots=True)
class PushOptions:
    """What a user asked for; see `loraformat.ops.push.push.push`."""

    repo: str
    with_gguf: bool
    base: str | None
    base_model: str | None
    licence: str | None
    choice: Choice
    dry_run: bool


@dataclass(frozen=True, slots=True)
class Parcel:
    """Files and a card.

    Attributes
    ----------
    kind : str
        ``adapter`` or ``bundle``.
    base : Base
    files : list of UploadFile
        Without the card.
    document : Document
        The generated part of the card.
    written_card : str or None
        The card that people wrote, which lies beside the files.
    left_out, notes : list of str
    replaces : tuple of str
        Globs of files on the Hub that leave if they are not among these.
    gguf_glob : str
        The same, if the weights are others.
    """

    kind: str
    base: Base
    files: list[UploadFile]
    document: Document
    written_card: str | None
    left_out: list[str]
    notes: list[str]
    replaces: tuple[str, ...]
    gguf_glob: str


def open_parcel(
    path: Path, wishes: PushOptions, workplace: Path, verify: Callable[[], None]
) -> Parcel:
    """Put together what is published of a path.

    Parameters
    ----------
    path : Path
    wishes : PushOptions
    workplace : Path
        An empty directory for files that are made on the way.
    verify : callable
        Verifies the path; called once it is known to be something to publish.

    Raises
    ------
    UnsupportedError
        If it is neither an adapter nor a bundle, or nobody says what its base is.
    """
    if is_bundle(path):
        given = {
            "--with-gguf": wishes.with_gguf,
            "--include": wishes.choice.include,
            "--exclude": wishes.choice.exclude,
            "--with-statistics": wishes.choice.statistics,
            "--whole-record": wishes.choice.whole_record,
            "--base": wishes.base,
        }
        if option := next((option for option, value in given.items() if value), None):
            raise UsageError(
                f"{option} applies to adapters; for a bundle, the files in its manifest are "
                "published",
                hint="omit it",
            )
        return _bundle(path, wishes, verify)
    reader = plugins.sniff(path)
    if reader.kind != "adapter":
        raise UnsupportedError(
            f"is {reader.name}, and only adapters and bundles can be published",
            path=path,
            hint="convert it to a bundle: loraformat convert MODEL BUNDLE",
        )
    return _adapter(path, reader, wishes, workplace, verify)


def _bundle(path: Path, wishes: PushOptions, verify: Callable[[], None]) -> Parcel:
    manifest: Manifest = read_manifest(path)
    named = bundle_base(manifest.source, wishes.base_model, str(path))
    verify()
    contents = bundle_files(path, manifest)
    base = look_up(named, wishes.licence, contents.notes, offline_ok=wishes.dry_run)
    said = info(path)
    assert isinstance(said, ModelInfo)
    facts = bundle_facts(said, manifest, wishes.repo, base, contents.files, peek_config(path))
    document = bundle_card(facts)
    return _parcel("bundle", base, contents, document, wishes, _BUNDLE_FILES)


def _adapter(
    path: Path, reader: Converter, wishes: PushOptions, workplace: Path, verify: Callable[[], None]
) -> Parcel:
    place = parse_bundle_slot(path)
    manifest = None if place is None else read_manifest(place.bundle)
    listed = None if manifest is None or place is None else manifest.adapters.get(place.name)
    with open_adapter(path, reader=reader, conditional=True, inspect=True) as adapter:
        named = adapter_base(adapter, wishes.base_model, manifest.source if manifest else None)
        said: AdapterInfo = description_of(adapter, path)
        task, local = adapter.config.get("task_type"), adapter.base_model
        labels = labels_of((name, tensor.shape) for name, tensor in adapter.replacements.items())
    verify()
    contents = adapter_files(path, named[0], wishes.choice, listed=listed)
    base = look_up(named, wishes.licence, contents.notes, offline_ok=wishes.dry_run)
    if wishes.with_gguf:
        if path.is_file():
            raise UsageError("--with-gguf needs a PEFT adapter, but this is a GGUF file")
        contents.files.append(
            gguf_file(
                path,
                wishes.repo,
                base,
                workplace,
                given=wishes.base,
                in_bundle=listed is not None,
                notes=contents.notes,
            )
        )
    contents.notes += said.notes
    in_bundle = listed is not None and wishes.base is None
    near = None if in_bundle else near_base(wishes.base, local, base)
    wrong = _wrong_in(path, near, is_given=wishes.base is not None, notes=contents.notes)
    at = None if near is None else Path(near.path)
    chat = chat_beside(path, at)
    facts = adapter_facts(said, task, wishes.repo, base, contents.files, wrong, chat, labels)
    document = adapter_card(facts)
    replaces = () if path.is_file() else _PEFT_FILES
    return _parcel("adapter", base, contents, document, wishes, replaces)


def _wrong_in(path: Path, near: NearBase | None, *, is_given: bool, notes: list[str]) -> set[str]:
    """Return the runtimes that would refuse an adapter or compute something else; say so."""
    try:
        report = check(path, base=None if near is None else near.path)
    except LoraFormatError as error:
        if near is None or is_given:
            raise
        notes.append(f"not compared with {near.word}: {error}")
        near, report = None, check(path)
    wrong = obstacles(report.findings)
    if wrong:
        named = ", ".join(f"{name} ({', '.join(rules)})" for name, rules in wrong.items())
        notes.append(
            f"would be rejected or computed differently by {named}; to fix this, run: loraformat "
            f"check {shlex.quote(str(path))}"
            + (f" --base {shlex.quote(near.word)}" if near is not None else "")
        )
    return set(wrong)


def _parcel(
    kind: str,
    base: Base,
    contents: Contents,
    document: Document,
    wishes: PushOptions,
    replaces: tuple[str, ...],
) -> Parcel:
    if wishes.licence is not None:  # said now, it wins over what was written before
        document = replace(document, facts=document.facts | {"license"})
    if contents.card is not None and is_template(contents.card):
        contents.notes.append("README.md is an unfilled template: the card replaces its text")
    return Parcel(
        kind=kind,
        base=base,
        files=contents.files,
        document=document,
        written_card=contents.card,
        left_out=contents.left_out,
        notes=contents.notes,
        replaces=replaces,
        gguf_glob=gguf_pattern(wishes.repo),
    )


def gguf_name(repo: str) -> str:
    """Return what the file is called in a repository.

    Examples
    --------
    >>> gguf_name("me/polite")
    'polite-lora-f16.gguf'
    """
    return f"{repo.rpartition('/')[2]}-lora-f16.gguf"


def gguf_pattern(repo: str) -> str:
    """Return the glob of the names that such a file may have had."""
    return f"{repo.rpartition('/')[2]}-lora-*.gguf"


def gguf_file(
    adapter: Path,
    repo: str,
    base: Base,
    workplace: Path,
    *,
    given: str | None,
    in_bundle: bool,
    notes: list[str],
) -> UploadFile:
    """Convert an adapter for llama.cpp.

    Parameters
    ----------
    adapter : Path
    repo : str
        Where it will be published, which names it.
    base : Base
        Its ``config.json`` is fetched from the Hub, if nothing nearer has it.
    workplace : Path
        Directory for the file; the caller's to remove.
    given : str or None
        The base that the user named with ``--base``.
    in_bundle : bool
        The adapter lies in a bundle, which is its base.
    notes : list of str
        Gets what a user should know.

    Raises
    ------
    LoraFormatError
        If GGUF cannot hold it, or the base's config cannot be had.
    """
    source: str | Path | None = given
    if given is None and not in_bundle:
        source = download(base.repo, base.revision, only=CONFIG_NAME) / CONFIG_NAME
    try:
        report = convert(adapter, workplace / gguf_name(repo), dtype="f16", base=source)
    except LoraFormatError as error:
        error.hint = f"{error.hint}; or omit --with-gguf" if error.hint else None
        raise
    notes += [f"{gguf_name(repo)}: {note}" for note in report.notes]
    return UploadFile.of_folder(SafeDirectory(workplace), gguf_name(repo))
