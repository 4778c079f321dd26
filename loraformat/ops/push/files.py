"""Selection of the files to publish.

A training directory holds much that is nobody's business: optimizer states, logs, notes. So
files are published by name, and what is left out is told. Traces of the training data stay
here, too, unless the user asks for them: activation statistics are second moments of what the
data made the layers see, and a training record has hashes of the data.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatch
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO, cast

from loraformat import plugins
from loraformat.bundle.integrity import file_record
from loraformat.bundle.manifest import Manifest
from loraformat.bundle.run_paths import CURVE_NAME, run_place
from loraformat.card.training import without_paths
from loraformat.errors import InputError, LoraFormatError, UnsupportedError, UsageError, printable
from loraformat.hub.tree import TreeFile, digest
from loraformat.model.adapter import STATISTICS_NAME
from loraformat.runtimes.chat import RECORD_NAME
from loraformat.storage import strict_json
from loraformat.storage.foreign_json import parse_object
from loraformat.storage.safe_directory import SafeDirectory
from loraformat.storage.safe_paths import CARD_NAME, MANIFEST_NAME, is_portable_path

__all__ = [
    "CONFIG_NAME",
    "Contents",
    "PushOptions",
    "UploadFile",
    "adapter_files",
    "bundle_files",
    "read_card",
    "read_record",
    "without_traces",
]

CONFIG_NAME = "adapter_config.json"
_INDEX_NAME = "model.safetensors.index.json"
#: What of a training record tells of its data: hashes, by which anybody who has a copy can see
#: that it was trained on, and prompts that were tried on the way.
TRACES = "hashes of the training data and the prompts of its samples"
_DATA = ("data", "held_out_data")
_HASHES = ("sha256", "fingerprint")
_NEEDED = re.compile(r"adapter_config\.json|adapter_model.*\.(safetensors|json)")
_MAX_JSON_BYTES = 16 << 20
_MAX_CARD_BYTES = 4 << 20
_ADAPTER = re.compile(
    r"adapter_config\.json|adapter_model(-\d+-of-\d+)?\.safetensors|"
    r"adapter_model\.safetensors\.index\.json|activation_statistics\.safetensors|"
    r"training_record\.json|tokenizer.*\.(json|model)|special_tokens_map\.json|"
    r"added_tokens\.json|vocab\.(json|txt)|merges\.txt|chat_template\.(jinja|json)|"
    r"spiece\.model|generation_config\.json|(LICEN[CS]E|NOTICE|USE_POLICY)[\w.-]*|"
    r"[\w.-]+\.(png|svg|gguf)"
)


@dataclass(frozen=True, slots=True)
class PushOptions:
    """What a user asked for; see `loraformat.ops.push.push.push`."""

    repo: str
    with_gguf: bool = False
    base: str | None = None
    base_model: str | None = None
    licence: str | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    with_statistics: bool = False
    whole_record: bool = False
    dry_run: bool = False

    def takes(self, name: str, *, belongs: bool) -> bool:
        """Tell whether a file of an adapter's directory is published."""
        if any(fnmatch(name, glob) for glob in self.exclude):
            return False
        if any(fnmatch(name, glob) for glob in self.include):
            return True
        return belongs and (self.with_statistics or name != STATISTICS_NAME)


@dataclass(slots=True)
class Contents:
    """The files to publish, without the card.

    Attributes
    ----------
    files : list of UploadFile
    left_out : list of str
        What else lies in the directory.
    card : str or None
        The card that lies there.
    notes : list of str
    """

    files: list[UploadFile] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    card: str | None = None
    notes: list[str] = field(default_factory=list)


def adapter_files(
    path: Path, base: str, options: PushOptions, *, listed: Iterable[str] | None = None
) -> Contents:
    """Return the files of an adapter.

    Parameters
    ----------
    path : Path
        A PEFT directory, or a single file.
    base : str
        The base's Hub id: the published config names it.
    options : PushOptions
    listed : iterable of str, optional
        The files that a bundle's manifest lists, if it lies in one.

    Raises
    ------
    UnsupportedError
        If its weights are in no file that may be published.
    UsageError
        If what it cannot be loaded without shall stay here.
    """
    if path.is_file():
        folder = SafeDirectory(path.parent)
        return Contents([UploadFile.of_folder(folder, path.name)])
    folder = SafeDirectory(path)
    found = Contents()
    names = folder.names() if listed is None else sorted(listed)
    for name in names:
        if name == CARD_NAME:
            found.card = read_card(folder)
        elif options.takes(name, belongs=_belongs(path / name, name)):
            found.files.append(_adapter_file(folder, name, base, options, found.notes))
        else:
            _refuse_without(name, options)
            found.left_out.append(name)
    if not any(re.fullmatch(r"adapter_model.*\.safetensors", file.path) for file in found.files):
        raise UnsupportedError(
            "its weights are a pickle, which is unsafe to publish",
            path=path,
            hint="convert it first: loraformat convert ADAPTER OUT --allow-pickle",
        )
    if not any(fnmatch(CURVE_NAME, glob) for glob in options.exclude):
        _add_curve(found, path)
    _say_statistics(found)
    return found


def _refuse_without(name: str, options: PushOptions) -> None:
    if _NEEDED.fullmatch(name) and any(fnmatch(name, glob) for glob in options.exclude):
        raise UsageError(
            f"--exclude leaves out {printable(name)}, without which the adapter cannot be loaded",
            hint="choose other files to exclude",
        )


def _say_statistics(found: Contents) -> None:
    if STATISTICS_NAME in found.left_out:
        found.notes.append(
            f"{STATISTICS_NAME} is not published, because it is derived from the training data; "
            "--with-statistics publishes it, for `reduce`"
        )
    elif any(file.path == STATISTICS_NAME for file in found.files):
        found.notes.append(f"{STATISTICS_NAME} is published; it is derived from the training data")


def _add_curve(found: Contents, path: Path) -> None:
    """Add the loss curve from the run directory."""
    run = run_place(path)
    there = any(file.path == CURVE_NAME for file in found.files)
    # A directory of that name may be what is left of another adapter.
    trained = isinstance(read_record(found.files).get("training"), dict)
    if trained and not there and (run / CURVE_NAME).is_file():
        found.files.append(UploadFile.of_folder(SafeDirectory(run), CURVE_NAME))
        found.notes.append(f"{CURVE_NAME} is from {run.name}")


def _belongs(path: Path, name: str) -> bool:
    """Tell whether a file is part of an adapter."""
    if not _ADAPTER.fullmatch(name):
        return False
    if not name.endswith(".gguf"):
        return True
    with contextlib.suppress(LoraFormatError):
        return plugins.sniff(path).kind == "adapter"
    return False


def read_card(folder: SafeDirectory) -> str:
    """Return the card in a directory.

    Raises
    ------
    InputError
        If it is not UTF-8, or longer than 4 MiB.
    """
    try:
        return folder.read(CARD_NAME, _MAX_CARD_BYTES).decode("utf-8")
    except UnicodeDecodeError:
        raise InputError(
            "is not UTF-8, as required by the Hub",
            path=folder.path / CARD_NAME,
            hint="save it again",
        ) from None


def _adapter_file(
    folder: SafeDirectory, name: str, base: str, options: PushOptions, notes: list[str]
) -> UploadFile:
    """Return a file unchanged; configs and records without local paths."""
    if name not in (CONFIG_NAME, RECORD_NAME):
        return UploadFile.of_folder(folder, name)
    found = _json(folder, name)
    said = dict(found)
    if name == CONFIG_NAME:
        said["base_model_name_or_path"] = base
        note = f"{name}: the published copy names {base} as its base"
    else:
        said = without_paths(found)
        note = f"{name}: absolute paths are shortened to file names in the published copy"
        _say_traces(found, options, notes)
        if not options.whole_record:
            shown, said = said, without_traces(said)
            note = note if shown != found else ""
    if said == found:
        return UploadFile.of_folder(folder, name)
    notes += [note] if note else []
    text = json.dumps(said, indent=2, ensure_ascii=False) + "\n"
    return UploadFile.of_bytes(name, text.encode("utf-8"))


def _say_traces(record: dict[str, Any], options: PushOptions, notes: list[str]) -> None:
    if without_traces(record) == record:
        return
    notes.append(
        f"{RECORD_NAME}: {TRACES} are published"
        if options.whole_record
        else f"{RECORD_NAME}: {TRACES} are not published; --whole-record publishes them"
    )


def _json(folder: SafeDirectory, name: str) -> dict[str, Any]:
    raw, path = folder.read(name, _MAX_JSON_BYTES), folder.path / name
    if name == CONFIG_NAME:
        return parse_object(raw, path)
    try:
        found = strict_json.loads(raw)
    except strict_json.StrictJsonError as error:
        raise UnsupportedError(f"not strict JSON: {error}", path=path) from None
    if not isinstance(found, dict):
        raise UnsupportedError("not a JSON object", path=path)
    return found


def read_record(files: Iterable[UploadFile]) -> dict[str, Any]:
    """Return the training record among the files; empty if there is none."""
    for file in files:
        if file.path == RECORD_NAME:
            with file.open() as stream:
                found = strict_json.loads(stream.read(_MAX_JSON_BYTES))
            return without_paths(found) if isinstance(found, dict) else {}
    return {}


def bundle_files(path: Path, manifest: Manifest) -> Contents:
    """Return the manifest of a verified bundle and the files that it lists."""
    folder = SafeDirectory(path)
    names = [MANIFEST_NAME, _INDEX_NAME, *manifest.files, *(s.file for s in manifest.shards)]
    for adapter, files in manifest.adapters.items():
        names += [f"adapters/{adapter}/{name}" for name in files]
    found = Contents(card=read_card(folder) if folder.has(CARD_NAME) else None)
    found.files = [UploadFile.of_folder(folder, name) for name in sorted(set(names))]
    found.left_out = sorted(set(folder.names()) - set(names) - {CARD_NAME})
    private = [n for n in names if n.rpartition("/")[2] in (STATISTICS_NAME, RECORD_NAME)]
    if private:
        found.notes.append(
            f"{', '.join(map(printable, sorted(private)))}: files derived from training data are "
            "published, because the bundle's manifest lists them"
        )
    return found


@dataclass(frozen=True, slots=True)
class UploadFile:
    """One file to publish.

    Attributes
    ----------
    path : str
        In the repository, with ``/``.
    content : Path or bytes
        Where it lies, links resolved; or what it holds.
    nbytes : int
    sha256 : str
    """

    path: str
    content: Path | bytes
    nbytes: int
    sha256: str

    @classmethod
    def of_bytes(cls, path: str, data: bytes) -> UploadFile:
        """Return a file that exists in memory only."""
        return cls(path, data, len(data), sha256(data).hexdigest())

    @classmethod
    def of_folder(cls, folder: SafeDirectory, name: str, path: str | None = None) -> UploadFile:
        """Hash a file of a directory; its name has to be one that every system can have."""
        path = path or name
        if not is_portable_path(path):
            raise UnsupportedError(
                f"{printable(path)} is not a portable file name",
                path=folder.path,
                hint="rename the file",
            )
        record = file_record(folder, name)
        return cls(path, (folder.path / name).resolve(), record.bytes, record.sha256)

    def matches(self, there: TreeFile | None) -> bool:
        """Tell whether the Hub has these bytes."""
        if there is None or there.nbytes != self.nbytes:
            return False
        if there.sha256 is not None:
            return there.sha256 == self.sha256
        with self.open() as file:
            return digest(file, there) == there.git_oid

    def open(self) -> BinaryIO:
        """Open it for reading."""
        if isinstance(self.content, bytes):
            return io.BytesIO(self.content)
        return cast(BinaryIO, os.fdopen(os.open(self.content, os.O_RDONLY), "rb"))


def without_traces(record: dict[str, Any]) -> dict[str, Any]:
    """Return a training record without hashes of its data and without its sample prompts.

    Examples
    --------
    >>> without_traces({"training": {"data": {"rows": 3, "fingerprint": "ab"}, "steps": 5}})
    {'training': {'data': {'rows': 3}, 'steps': 5}}
    """
    told = record.get("training")
    if isinstance(told, dict):
        return {**record, "training": without_traces(told)}
    found = {
        name: _without(value, _HASHES) if name in _DATA else value for name, value in record.items()
    }
    if isinstance(found.get("settings"), dict):
        found["settings"] = {n: v for n, v in found["settings"].items() if n != "prompt"}
    return found


def _without(value: Any, names: Iterable[str]) -> Any:
    if isinstance(value, dict):
        return {name: _without(one, names) for name, one in value.items() if name not in names}
    if isinstance(value, list):
        return [_without(one, names) for one in value]
    return value
