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
from loraformat.bundle.update import read_manifest
from loraformat.card import (
    AdapterFacts,
    Base,
    BundleFacts,
    Document,
    FileFact,
    adapter_card,
    bundle_card,
    is_template,
)
from loraformat.errors import LoraFormatError, UnsupportedError, UsageError
from loraformat.hub.source import download
from loraformat.model.config_json import CONFIG_NAME
from loraformat.model.description import ModelInfo
from loraformat.model.tied_head import lacks_head
from loraformat.ops.check.chats import chat_beside
from loraformat.ops.check.check import check
from loraformat.ops.convert.convert import convert
from loraformat.ops.info.adapter import description_of
from loraformat.ops.info.model import info
from loraformat.ops.opening.adapter import listing
from loraformat.ops.push.base_info import LocalBase, adapter_base, bundle_base, local_base, look_up
from loraformat.ops.push.files import CONFIG_NAME as ADAPTER_CONFIG_NAME
from loraformat.ops.push.files import (
    Contents,
    PushOptions,
    UploadFile,
    adapter_files,
    bundle_files,
    read_record,
)
from loraformat.plugins import AdapterFormat, AdapterReadOptions
from loraformat.runtimes.judge import obstacles
from loraformat.runtimes.task_usage import labels_of
from loraformat.shards.read_directory import peek_config
from loraformat.storage.safe_directory import SafeDirectory

__all__ = ["UploadPlan", "gguf_name", "gguf_pattern", "plan_upload"]

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
class UploadPlan:
    """Files of an adapter or a bundle, and the generated part of the card.

    ``replaces`` are globs of files on the Hub that leave if they are not among these.
    """

    kind: str
    base: Base
    contents: Contents
    document: Document
    replaces: tuple[str, ...]


def plan_upload(
    path: Path, options: PushOptions, workplace: Path, verify: Callable[[], None]
) -> UploadPlan:
    """Assemble the files to publish and their card.

    ``workplace`` is an empty directory for files that are made on the way. ``verify`` verifies the
    path; it is called once that is known to be something to publish.

    Raises
    ------
    UnsupportedError
        If it is neither an adapter nor a bundle, or nobody says what its base is.
    """
    if is_bundle(path):
        given = {
            "--with-gguf": options.with_gguf,
            "--include": options.include,
            "--exclude": options.exclude,
            "--with-statistics": options.with_statistics,
            "--whole-record": options.whole_record,
            "--base": options.base,
        }
        if option := next((option for option, value in given.items() if value), None):
            raise UsageError(
                f"{option} applies to adapters; for a bundle, the files in its manifest are "
                "published",
                hint="omit it",
            )
        plan = _bundle(path, options, verify)
    elif isinstance(reader := plugins.sniff(path), AdapterFormat):
        plan = _adapter(path, reader, options, workplace, verify)
    else:
        raise UnsupportedError(
            f"is {reader.name}, and only adapters and bundles can be published",
            path=path,
            hint="convert it to a bundle: loraformat convert MODEL BUNDLE",
        )
    if options.licence is not None:  # said now, it wins over what was written before
        document = replace(plan.document, facts=plan.document.facts | {"license"})
        plan = replace(plan, document=document)
    if plan.contents.card is not None and is_template(plan.contents.card):
        plan.contents.notes.append("README.md is an unfilled template: the card replaces its text")
    return plan


def _bundle(path: Path, options: PushOptions, verify: Callable[[], None]) -> UploadPlan:
    manifest: Manifest = read_manifest(path)
    named = bundle_base(manifest.source, options.base_model, str(path))
    verify()
    contents = bundle_files(path, manifest)
    base = look_up(named, options.licence, contents.notes, offline_ok=options.dry_run)
    said = info(path)
    assert isinstance(said, ModelInfo)
    headless = lacks_head(manifest.tensors, peek_config(path))
    facts = BundleFacts(options.repo, base, said, _listed(contents.files), headless)
    return UploadPlan("bundle", base, contents, bundle_card(facts), _BUNDLE_FILES)


def _listed(files: list[UploadFile]) -> list[FileFact]:
    ordered = sorted(files, key=lambda file: file.path)
    return [FileFact(file.path, file.nbytes, file.sha256) for file in ordered]


def _adapter(
    path: Path,
    reader: AdapterFormat,
    options: PushOptions,
    workplace: Path,
    verify: Callable[[], None],
) -> UploadPlan:
    manifest, listed = listing(path)
    with reader.read(path, AdapterReadOptions(conditional=True, inspect=True)) as adapter:
        named = adapter_base(adapter, options.base_model, manifest.source if manifest else None)
        said = description_of(adapter, path)
        task, local = adapter.config.get("task_type"), adapter.base_model
        labels = labels_of((name, tensor.shape) for name, tensor in adapter.replacements.items())
    verify()
    contents = adapter_files(path, named[0], options, listed=listed)
    in_bundle = listed is not None and options.base is None  # which is the base then
    base = look_up(named, options.licence, contents.notes, offline_ok=options.dry_run)
    if options.with_gguf:
        if path.is_file():
            raise UsageError("--with-gguf needs a PEFT adapter, but this is a GGUF file")
        contents.files.append(_gguf_file(path, options, base, workplace, in_bundle, contents.notes))
    contents.notes += said.notes
    near = None if in_bundle else local_base(options.base, local, base)
    wrong = _wrong_in(path, near, is_given=options.base is not None, notes=contents.notes)
    ggufs = [file.path for file in contents.files if file.path.endswith(".gguf")]
    facts = AdapterFacts(
        repo=options.repo,
        base=base,
        said=said,
        files=_listed(contents.files),
        peft=any(file.path == ADAPTER_CONFIG_NAME for file in contents.files),
        gguf=ggufs[0] if ggufs else None,
        task=task if isinstance(task, str) else None,
        labels=labels,
        training=read_record(contents.files),
        wrong_in=frozenset(wrong),
        chat=chat_beside(path, None if near is None else Path(near.path)),
    )
    replaces = () if path.is_file() else _PEFT_FILES
    return UploadPlan("adapter", base, contents, adapter_card(facts), replaces)


def _wrong_in(path: Path, near: LocalBase | None, *, is_given: bool, notes: list[str]) -> set[str]:
    """Return the runtimes that would refuse an adapter or compute something else, with notes."""
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


def gguf_name(repo: str) -> str:
    """Return the GGUF file's name in the repository.

    Examples
    --------
    >>> gguf_name("me/polite")
    'polite-lora-f16.gguf'
    """
    return f"{repo.rpartition('/')[2]}-lora-f16.gguf"


def gguf_pattern(repo: str) -> str:
    """Return a glob for the GGUF file's possible earlier names."""
    return f"{repo.rpartition('/')[2]}-lora-*.gguf"


def _gguf_file(
    adapter: Path,
    options: PushOptions,
    base: Base,
    workplace: Path,
    in_bundle: bool,
    notes: list[str],
) -> UploadFile:
    """Convert an adapter for llama.cpp, into a directory that is the caller's to remove.

    Unless the user names a base, or the adapter lies in its bundle, the base's ``config.json`` is
    fetched from the Hub.

    Raises
    ------
    LoraFormatError
        If GGUF cannot hold it, or the base's config cannot be had.
    """
    name, source = gguf_name(options.repo), options.base
    if source is None and not in_bundle:
        source = str(download(base.repo, base.revision, only=CONFIG_NAME) / CONFIG_NAME)
    try:
        report = convert(adapter, workplace / name, dtype="f16", base=source)
    except LoraFormatError as error:
        error.hint = f"{error.hint}; or omit --with-gguf" if error.hint else None
        raise
    notes += [f"{name}: {note}" for note in report.notes]
    return UploadFile.of_folder(SafeDirectory(workplace), name)
