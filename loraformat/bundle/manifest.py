"""The manifest, ``loraformat.json``: data classes and serialization.

The manifest is what makes a directory a bundle. It names every tensor with its
encoding, shape, dtype and SHA-256, every shard and carried file with its size,
and the fingerprint of the base. It is read, and held to its rules, by
`loraformat.bundle.manifest_rules`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from typing import Any

from loraformat.model.written import FileRecord, ShardRecord, TensorRecord

__all__ = [
    "FORMAT_VERSION",
    "SEGMENTS",
    "SEGMENTS_VERSION",
    "Manifest",
    "fingerprint",
    "has_segments",
]

FORMAT_VERSION = "1.0"
#: The same of a base with segments, and the extension that it must have.
SEGMENTS_VERSION = "1.1"
SEGMENTS = "pypi.org/project/loraformat/segments"


@dataclass(frozen=True, slots=True)
class Manifest:
    """A parsed manifest.

    Attributes
    ----------
    created_by : str
        Program and version that wrote the bundle.
    source : dict of str to str
        ``format`` and, if the base came from a Hub, ``repo`` and ``revision``.
    shard_limit : int
        Bytes of tensor data that the writer allowed per shard.
    shards : tuple of ShardRecord
    tensors : dict of str to TensorRecord
        In execution order.
    files : dict of str to FileRecord
        Carried files by relative path.
    adapters : dict of str to dict of str to FileRecord
        The files of each adapter by adapter name, relative to ``adapters/NAME``.
    extensions : dict of str to dict
    fingerprint : str
    format_version : str
    """

    created_by: str
    source: dict[str, str]
    shard_limit: int
    shards: tuple[ShardRecord, ...]
    tensors: dict[str, TensorRecord]
    files: dict[str, FileRecord]
    fingerprint: str
    adapters: dict[str, dict[str, FileRecord]] = field(default_factory=dict)
    extensions: dict[str, dict[str, Any]] = field(default_factory=dict)
    format_version: str = FORMAT_VERSION

    @property
    def listed_files(self) -> dict[str, FileRecord]:
        """All carried files and those of adapters, by path in the bundle."""
        listed = dict(self.files)
        for name, files in self.adapters.items():
            listed |= {f"adapters/{name}/{path}": record for path, record in files.items()}
        return listed

    @staticmethod
    def version_of(tensors: Mapping[str, TensorRecord]) -> tuple[str, dict[str, dict[str, Any]]]:
        """Return the oldest version that expresses some weights, and the extension it needs."""
        if has_segments(tensors):
            return SEGMENTS_VERSION, {SEGMENTS: {"must_understand": True}}
        return FORMAT_VERSION, {}

    def encode(self) -> bytes:
        """Return the manifest's bytes: UTF-8 JSON, one line per tensor, a final newline."""
        head = {
            "format": "loraformat",
            "format_version": self.format_version,
            "created_by": self.created_by,
            "source": self.source,
            "fingerprint": self.fingerprint,
            "shard_limit": self.shard_limit,
        }
        members = [f"  {_text(key)}: {_text(value)}" for key, value in head.items()]
        shards = ",\n".join(f"    {_text(asdict(shard))}" for shard in self.shards)
        members.append(f'  "shards": [\n{shards}\n  ]')
        members.append(_block("tensors", {name: t.to_json() for name, t in self.tensors.items()}))
        members.append(_block("files", _listing(self.files)))
        adapters = {name: {"files": _listing(files)} for name, files in self.adapters.items()}
        members.append(_block("adapters", adapters))
        members.append(_block("extensions", self.extensions))
        return ("{\n" + ",\n".join(members) + "\n}\n").encode("utf-8")


def has_segments(tensors: Mapping[str, TensorRecord]) -> bool:
    """Tell whether a weight of a base is quantized in segments."""
    return any(record.segments is not None for record in tensors.values())


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _listing(files: Mapping[str, FileRecord]) -> dict[str, Any]:
    return {path: asdict(record) for path, record in files.items()}


def _block(key: str, members: Mapping[str, Any]) -> str:
    if not members:
        return f'  "{key}": {{}}'
    lines = ",\n".join(f"    {_text(name)}: {_text(value)}" for name, value in members.items())
    return f'  "{key}": {{\n{lines}\n  }}'


def fingerprint(tensors: Mapping[str, TensorRecord]) -> str:
    """Return the fingerprint of a base: a hash of its weights that does not depend on the shards.

    One line per tensor, sorted by the UTF-8 bytes of the name: name, encoding
    (``nf4-transposed`` for transposed codes), dtype, dimensions joined by commas, SHA-256;
    separated by tabs and ended by a newline. The SHA-256 of these lines, as 64 lowercase
    hexadecimal digits.

    Examples
    --------
    >>> fingerprint({"w": TensorRecord("dense", "F32", (2, 3), "0" * 64)})[:16]
    'efa73e0bc56cd73e'
    """
    digest = sha256()
    for name in sorted(tensors, key=lambda name: name.encode("utf-8")):
        record = tensors[name]
        shape = ",".join(map(str, record.shape))
        encoding = f"{record.encoding}-transposed" if record.transposed else record.encoding
        line = f"{name}\t{encoding}\t{record.dtype}\t{shape}\t{record.sha256}\n"
        digest.update(line.encode("utf-8"))
    return digest.hexdigest()
