"""``loraformat verify``: verification of structure and hashes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

from loraformat import plugins
from loraformat.bundle.integrity import Finding, check_adapter, check_listed, verify_bundle
from loraformat.bundle.reader import is_bundle
from loraformat.bundle.update import read_manifest
from loraformat.errors import FormatError, InputError
from loraformat.hub import resolve
from loraformat.model.checkpoint import NF4Tensor
from loraformat.model.report import Report
from loraformat.ops.adapter_output.form import check_values, tensors_of
from loraformat.ops.arguments import Progress, reported
from loraformat.ops.opening.adapter import listing
from loraformat.ops.opening.model import open_model
from loraformat.plugins import AdapterFormat, AdapterReadOptions
from loraformat.shards.index_json import INDEX_NAME
from loraformat.storage.safe_directory import SafeDirectory
from loraformat.storage.safe_paths import CARD_NAME

__all__ = ["VerificationReport", "verify"]

_ADAPTER_WEIGHTS = "adapter_model.safetensors"
#: Files that transformers loads from a model's directory because they lie there.
_LOADED = re.compile(
    r"(model\.safetensors(\.index\.json)?|generation_config\.json|adapter_config\.json"
    r"|(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|chat_template)\.json"
    r"|(pre)?processor_config\.json|(tokenizer|spiece)\.model|vocab\.txt|merges\.txt"
    r"|chat_template\.jinja|(additional_)?chat_templates/.*|[^/]*\.py)"
)


@dataclass(frozen=True, slots=True, repr=False)
class VerificationReport(Report):
    """What was checked.

    Attributes
    ----------
    path, format : str
    tensors : int
        Logical tensors that were looked at.
    hashed : bool
        Whether the format has hashes to compare.
    findings : list of Finding
        Empty if it is sound.
    """

    _shared: ClassVar[tuple[str, ...]] = ()

    path: str
    format: str
    tensors: int
    hashed: bool
    findings: list[Finding]


def verify(
    path: str | Path, *, allow_pickle: bool = False, progress: Progress = False
) -> VerificationReport:
    """Verify structure and hashes of a model or an adapter.

    `path` is a local path or a Hub id, of a model or an adapter. A bundle, or an adapter in one, is
    verified against the hashes in its manifest. Other formats have no hashes: their headers and
    scales are checked, and an adapter's factor pairs, shapes and values.

    Parameters
    ----------
    path : str or Path
        A local path, or ``org/name[@revision]`` on the Hub.
    allow_pickle, progress
        As in `convert`.

    Returns
    -------
    VerificationReport
        Its findings are empty if everything is sound.
    """
    found = resolve(path, pickles=allow_pickle).path
    with reported(progress, "verify") as told:
        if is_bundle(found):
            return _bundle(found, told)
        reader = plugins.sniff(found)
        if isinstance(reader, AdapterFormat):
            return _adapter(found, reader, allow_pickle)
        count, findings = 0, []
        try:
            with open_model(found, reader=reader, allow_pickle=allow_pickle) as checkpoint:
                tensors = list(checkpoint.tensors.values())
                for count, tensor in enumerate(tensors, 1):
                    if isinstance(tensor, NF4Tensor):
                        tensor.load()  # which looks at the scales
                        tensor.release()
                    told(count, len(tensors))
        except FormatError as error:
            findings = [Finding(error.rule, error.path or str(found), error.problem)]
        return VerificationReport(str(found), reader.name, count, False, findings)


def _adapter(path: Path, reader: AdapterFormat, allow_pickle: bool) -> VerificationReport:
    """Check an adapter: its files and, in a bundle, their hashes; then that it means something."""
    folder = SafeDirectory(path) if path.is_dir() else None
    manifest, listed = listing(path)
    count = 0

    def values() -> None:
        nonlocal count
        options = AdapterReadOptions(None, allow_pickle, conditional=True, inspect=True)
        with reader.read(path, options) as adapter:
            check_values(adapter)
            count = sum(1 for _ in tensors_of(adapter))

    checks: list[Callable[[], None]] = []
    if folder is not None and listed is not None:
        checks += [partial(check_listed, folder, {name: record}) for name, record in listed.items()]
    if folder is not None and folder.has(_ADAPTER_WEIGHTS):
        fingerprint = None if manifest is None else manifest.fingerprint
        checks.append(partial(check_adapter, folder, ".", fingerprint))
    findings = [finding for check in checks for finding in _finding(check, path)]
    findings = findings or _finding(values, path)
    return VerificationReport(str(path), reader.name, count, listed is not None, findings)


def _finding(check: Callable[[], None], path: Path) -> list[Finding]:
    try:
        check()
    except FormatError as error:
        return [Finding(error.rule, error.path or str(path), error.problem)]
    except InputError as error:  # no rule of the specification, but nothing can use it
        return [Finding("", error.path or str(path), error.problem)]
    return []


def _bundle(path: Path, progress: Callable[[int, int], None]) -> VerificationReport:
    total = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    done = tensors = 0

    def count(nbytes: int) -> None:
        nonlocal done, tensors
        done += nbytes
        tensors += 1
        progress(done, total)

    findings = verify_bundle(path, progress=count)
    if not findings:  # else the manifest itself may be what is wrong
        findings = [*_unlisted(path)]
    return VerificationReport(str(path), "loraformat", tensors, True, findings)


def _unlisted(path: Path) -> Iterator[Finding]:
    """Yield files that no hash covers, and that transformers would load."""
    manifest = read_manifest(path)
    listed = {*manifest.files, *(shard.file for shard in manifest.shards), INDEX_NAME, CARD_NAME}
    for name in SafeDirectory(path).names():
        if name not in listed and _LOADED.fullmatch(name):
            yield Finding(
                "",
                str(path / name),
                "is not listed in the manifest, but transformers would load it; move it "
                "elsewhere, or convert again with it in the source directory",
            )
