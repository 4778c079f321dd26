"""Bundle verification: every rule and every hash.

Structure is checked by opening; here every byte is read and compared with its SHA-256,
and adapters are opened. Rules ``A..`` and ``V..`` of ``spec/loraformat-1.1.md``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from loraformat.bundle.reader import Bundle, load_verified, open_bundle
from loraformat.bundle.rules import check_size
from loraformat.errors import FormatError, InputError
from loraformat.model.base_match import BaseMatch
from loraformat.model.written import FileRecord
from loraformat.storage.foreign_json import parse_object
from loraformat.storage.safe_directory import SafeDirectory
from loraformat.tensors.mapped import MappedFile

__all__ = [
    "BASE_FINGERPRINT",
    "BASE_SOURCE",
    "Finding",
    "check_adapter",
    "check_listed",
    "file_record",
    "verify_bundle",
]

#: Members of an adapter's ``__metadata__`` that name the base it was trained on.
BASE_FINGERPRINT = "loraformat.base_fingerprint"
BASE_SOURCE = "loraformat.base_source"

_MAX_ADAPTER_CONFIG_BYTES = 1 << 20
_PIECE = 1 << 20


@dataclass(frozen=True, slots=True)
class Finding:
    """One broken rule.

    Attributes
    ----------
    rule : str
        Its id; empty for what no rule of the specification forbids, in formats that are not
        ours.
    path : str
        The file.
    problem : str
    """

    rule: str
    path: str
    problem: str


def verify_bundle(
    path: Path, *, progress: Callable[[int], None] = lambda nbytes: None
) -> list[Finding]:
    """Check a bundle completely; a sound one has no findings.

    A broken structure is one finding, as nothing behind it can be trusted; otherwise every wrong
    hash is listed. `progress` is called with the number of bytes verified since its last call.
    """
    try:
        bundle = open_bundle(path)
    except FormatError as error:
        return [_finding(error)]
    with bundle:
        findings = _verify_files(bundle)
        for name in bundle.manifest.adapters:
            try:
                check_adapter(bundle.folder, f"adapters/{name}", bundle.manifest.fingerprint)
            except FormatError as error:
                findings.append(_finding(error))
        for name, record in bundle.manifest.tensors.items():
            tensor = bundle.tensors[name]
            try:
                load_verified(tensor, record.sha256, path)
            except FormatError as error:
                findings.append(_finding(error))
            tensor.release()
            progress(tensor.nbytes)
    return findings


def _finding(error: FormatError) -> Finding:
    return Finding(error.rule, error.path or "", error.problem)


def _verify_files(bundle: Bundle) -> list[Finding]:
    return [
        Finding("V03", str(bundle.folder.path / path), "its SHA-256 is not the manifest's")
        for path, record in bundle.manifest.listed_files.items()
        if file_record(bundle.folder, path).sha256 != record.sha256
    ]


def file_record(folder: SafeDirectory, path: str) -> FileRecord:
    """Return a file's size and SHA-256, as a manifest lists them."""
    digest, nbytes = sha256(), 0
    with os.fdopen(folder.open(path), "rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
            nbytes += len(piece)
    return FileRecord(nbytes, digest.hexdigest())


def check_listed(folder: SafeDirectory, records: Mapping[str, FileRecord]) -> None:
    """Compare files with their records in a manifest.

    Raises `FormatError` B05 or V03, naming the first file that is missing or another.
    """
    for name, record in records.items():
        check_size(folder, name, record)
        if file_record(folder, name) != record:
            raise FormatError("V03", "its SHA-256 is not the manifest's", path=folder.path / name)


def check_adapter(folder: SafeDirectory, directory: str, fingerprint: str | None) -> None:
    """Check that an adapter is readable and belongs to this base: rules A01, A02 and H.

    Of an adapter outside of a bundle, whose fingerprint is None here, A01 says nothing.
    """
    config = f"{directory}/adapter_config.json"
    if folder.size(config) > _MAX_ADAPTER_CONFIG_BYTES:
        raise FormatError("A02", "longer than 1 MiB", path=folder.path / config)
    try:
        parse_object(folder.read(config, _MAX_ADAPTER_CONFIG_BYTES), config)
    except InputError as error:
        raise FormatError("A02", error.problem, path=folder.path / config) from None
    weights = MappedFile(folder, f"{directory}/adapter_model.safetensors")
    weights.close()
    match = BaseMatch(weights.header.metadata.get(BASE_FINGERPRINT), fingerprint)
    if match.relation == "other":
        raise FormatError(
            "A01",
            match.difference,
            path=weights.path,
            hint="use the adapter with the bundle that it was trained on",
        )
