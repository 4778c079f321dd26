"""Manifest parsing and validation (rules M01 to M13).

This module reads no file; what compares the manifest with other files is checked in
`loraformat.bundle.rules`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from os import PathLike
from typing import Any

from loraformat.bundle.manifest import (
    FORMAT_VERSION,
    SEGMENTS,
    Manifest,
    fingerprint,
    has_segments,
)
from loraformat.errors import FormatError, printable
from loraformat.model.written import FileRecord, ShardRecord, TensorRecord
from loraformat.shards.layout import shard_name
from loraformat.storage import strict_json
from loraformat.storage.safe_paths import (
    MANIFEST_NAME,
    is_adapter_name,
    is_portable_path,
    is_safe_path,
)
from loraformat.tensors.dtypes import FORMAT_DTYPES, WEIGHT_DTYPES
from loraformat.tensors.header import is_clean_name, is_clean_text

__all__ = ["MAX_MANIFEST_BYTES", "parse_manifest"]

#: Longest manifest that is read (bytes).
MAX_MANIFEST_BYTES = 64 << 20

_SUPPORTED_MAJOR = 1
_SUPPORTED_MINOR = 1
_MAX_COUNT = 1 << 53
_SHA256 = re.compile(r"[0-9a-f]{64}")
_VERSION = re.compile(r"(0|[1-9][0-9]{0,5})\.(0|[1-9][0-9]{0,5})")


def parse_manifest(raw: bytes, path: str | PathLike[str] = MANIFEST_NAME) -> Manifest:
    """Parse and check a whole manifest, whose path is for messages.

    Raises `FormatError` naming the broken rule, M01 to M13.
    """
    return _Parser(path).manifest(raw)


class _Parser:
    """Parser with one method per member; every error names the manifest."""

    def __init__(self, path: str | PathLike[str]) -> None:
        self.path = path
        self.newer = False  # a newer minor version may have added members
        self.more: tuple[str, ...] = ()  # what 1.1 added to NF4 weights

    def broken(self, rule: str, problem: str, hint: str | None = None) -> FormatError:
        return FormatError(rule, problem, path=self.path, hint=hint)

    def manifest(self, raw: bytes) -> Manifest:
        if len(raw) > MAX_MANIFEST_BYTES:
            raise self.broken("M01", f"longer than {MAX_MANIFEST_BYTES} bytes")
        try:
            top = strict_json.loads(raw)
        except strict_json.StrictJsonError as error:
            raise self.broken("M01", f"not strict JSON: {error}") from None
        if not isinstance(top, dict) or top.get("format") != "loraformat":
            raise self.broken("M02", 'not a manifest, wanted an object with "format": "loraformat"')
        version = self.version(top.get("format_version"))
        required = {
            "format", "format_version", "created_by", "source", "fingerprint", "shard_limit",
            "shards", "tensors", "files", "adapters", "extensions",
        }  # fmt: skip
        self.members("M04", "the manifest", top, required)
        tensors = self.tensors(top["tensors"])
        if top["fingerprint"] != fingerprint(tensors):
            raise self.broken(
                "M10", f"fingerprint {printable(top['fingerprint'])} is not that of its tensors"
            )
        return Manifest(
            created_by=self.string(top["created_by"], "created_by"),
            source=self.source(top["source"]),
            shard_limit=self.count(top["shard_limit"], "shard_limit"),
            shards=self.shards(top["shards"]),
            tensors=tensors,
            files=self.files(top["files"], "files"),
            fingerprint=top["fingerprint"],
            adapters=self.adapters(top["adapters"]),
            extensions=self.extensions(top["extensions"], has_segments(tensors)),
            format_version=version,
        )

    def version(self, value: Any) -> str:
        match = _VERSION.fullmatch(value) if isinstance(value, str) else None
        if match is None:
            raise self.broken("M03", f'format_version is {printable(value)}, wanted "MAJOR.MINOR"')
        if int(match[1]) != _SUPPORTED_MAJOR:
            raise self.broken(
                "M03",
                f"format version {value}, this program reads {_SUPPORTED_MAJOR}.x",
                hint="install a newer loraformat" if int(match[1]) > _SUPPORTED_MAJOR else None,
            )
        self.newer = int(match[2]) > _SUPPORTED_MINOR
        self.more = () if match[0] == FORMAT_VERSION else ("segments",)
        return match[0]

    def object(self, rule: str, what: str, value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self.broken(rule, f"{what} is not an object")
        return value

    def members(
        self, rule: str, what: str, value: Any, required: Iterable[str], more: Iterable[str] = ()
    ) -> None:
        self.object(rule, what, value)
        required = set(required)
        if missing := sorted(required - value.keys()):
            raise self.broken(rule, f"{what} lacks {', '.join(missing)}")
        if not self.newer and (unknown := sorted(value.keys() - required.union(more))):
            raise self.broken(rule, f"{what} has unknown member {printable(unknown[0])}")

    def string(self, value: Any, what: str) -> str:
        if not isinstance(value, str) or len(value) > 1024 or not is_clean_text(value):
            raise self.broken("M04", f"{what} is not clean text of at most 1024 characters")
        return value

    def count(self, value: Any, what: str, rule: str = "M04") -> int:
        if type(value) is not int or not 0 <= value < _MAX_COUNT:
            raise self.broken(
                rule, f"{what} is {printable(value)}, wanted an integer from 0 to 2^53"
            )
        return value

    def digest(self, value: Any, what: str) -> str:
        if not isinstance(value, str) or not _SHA256.fullmatch(value):
            raise self.broken("M06", f"{what} has SHA-256 {printable(value)}, wanted 64 hex digits")
        return value

    def source(self, value: Any) -> dict[str, str]:
        known = {"format", "repo", "revision"}
        if (
            not isinstance(value, dict)
            or "format" not in value
            or (value.keys() - known and not self.newer)
        ):
            raise self.broken("M04", "source must have format and at most repo and revision")
        return {key: self.string(value[key], f"source.{key}") for key in value if key in known}

    def tensors(self, value: Any) -> dict[str, TensorRecord]:
        tensors = self.object("M04", "tensors", value)
        return {name: self.tensor(name, record) for name, record in tensors.items()}

    def tensor(self, name: str, value: Any) -> TensorRecord:
        what = f"tensor {printable(name)}"
        if not is_clean_name(name):
            raise self.broken("M05", f"{what} has a name that is not clean")
        encoding = value.get("encoding") if isinstance(value, dict) else None
        if encoding not in ("dense", "nf4"):
            raise self.broken(
                "M05", f"{what} has encoding {printable(encoding)}, wanted dense or nf4"
            )
        required = {"encoding", "dtype", "shape", "sha256"}
        if encoding == "nf4":
            required |= {"block_size", "double_quant", "transposed", "relative_rms_error"}
        self.members("M05", what, value, required, self.more if encoding == "nf4" else ())
        dtypes = FORMAT_DTYPES if encoding == "dense" else WEIGHT_DTYPES.values()
        if not isinstance(value["dtype"], str) or value["dtype"] not in dtypes:
            raise self.broken("M05", f"{what} has dtype {printable(value['dtype'])}")
        shape = value["shape"]
        if not isinstance(shape, list) or len(shape) > 8:
            raise self.broken("M05", f"{what} has shape {printable(shape)}")
        return TensorRecord(
            encoding=encoding,
            dtype=value["dtype"],
            shape=tuple(self.count(n, f"{what}: a dimension", "M05") for n in shape),
            sha256=self.digest(value["sha256"], what),
            **(self.nf4_members(what, value) if encoding == "nf4" else {}),
        )

    def nf4_members(self, what: str, value: dict[str, Any]) -> dict[str, Any]:
        error = value["relative_rms_error"]
        segments = None
        if "segments" in self.more and "segments" in value:
            segments = self.count(value["segments"], f"{what}: segments", "M05")
        sound = (
            type(value["double_quant"]) is bool
            and type(value["transposed"]) is bool
            and (not value["transposed"] or (len(value["shape"]) == 2 and segments is None))
            and segments != 0
            and (error is None or (type(error) in (int, float) and error >= 0))
        )
        if not sound:
            raise self.broken(
                "M05",
                f"{what} has a member of a wrong type, no segments, or is transposed but not 2-D",
            )
        return {
            "block_size": self.count(value["block_size"], f"{what}: block_size", "M05"),
            "double_quant": value["double_quant"],
            "transposed": value["transposed"],
            "relative_rms_error": error,
            "segments": segments,
        }

    def shards(self, value: Any) -> tuple[ShardRecord, ...]:
        if not isinstance(value, list) or not value or len(value) > 99_999:
            raise self.broken("M07", "shards is not a list of 1 to 99,999 shards")
        records = []
        for number, shard in enumerate(value, 1):
            wanted = shard_name(number - 1, len(value))
            self.members("M07", f"shard {number}", shard, ("file", "bytes", "header_sha256"))
            if shard["file"] != wanted:
                raise self.broken(
                    "M07", f"shard {number} is named {printable(shard['file'])}, wanted {wanted}"
                )
            size = self.count(shard["bytes"], f"shard {number}: bytes", "M07")
            records.append(ShardRecord(wanted, size, self.digest(shard["header_sha256"], wanted)))
        return tuple(records)

    def files(
        self, value: Any, what: str, is_safe: Callable[[str], bool] = is_safe_path
    ) -> dict[str, FileRecord]:
        self.distinct(self.object("M08", what, value), what)
        records = {}
        for path, record in value.items():
            if not is_safe(path):
                raise self.broken("M08", f"{what}: path {printable(path)} is not safe")
            self.members("M08", f"{what}: {path}", record, ("bytes", "sha256"))
            size = self.count(record["bytes"], f"{what}: {path}: bytes", "M08")
            records[path] = FileRecord(size, self.digest(record["sha256"], path))
        return records

    def distinct(self, names: Iterable[str], what: str) -> None:
        seen: dict[str, str] = {}
        for name in names:
            other = seen.setdefault(name.lower(), name)
            if other != name:
                raise self.broken(
                    "M12", f"{what}: {printable(other)} and {printable(name)} differ only in case"
                )

    def adapters(self, value: Any) -> dict[str, dict[str, FileRecord]]:
        self.distinct(self.object("M09", "adapters", value), "adapters")
        adapters = {}
        for name, record in value.items():
            what = f"adapter {printable(name)}"
            if not is_adapter_name(name):
                raise self.broken("M09", f"{what}: not a safe directory name")
            self.members("M09", what, record, ("files",))
            files = self.files(record["files"], what, is_portable_path)
            if not {"adapter_config.json", "adapter_model.safetensors"} <= files.keys():
                raise self.broken(
                    "M09", f"{what} lacks adapter_config.json or adapter_model.safetensors"
                )
            adapters[name] = files
        return adapters

    def extensions(self, value: Any, segments: bool) -> dict[str, dict[str, Any]]:
        extensions = self.object("M11", "extensions", value)
        for name, body in extensions.items():
            what = f"extension {printable(name)}"
            understood = self.object("M11", what, body).get("must_understand", True) is False
            if name != SEGMENTS and not understood:
                problem = f"{what} must be understood, and is unknown here"
                raise self.broken("M11", problem, hint="install a newer loraformat")
        if segments != (SEGMENTS in extensions):
            problem = "lacks" if segments else "has no segments, and needs no"
            raise self.broken("M13", f"the base {problem} extension {SEGMENTS}")
        if segments and extensions[SEGMENTS].get("must_understand") is not True:
            raise self.broken("M13", f"extension {SEGMENTS} does not say must_understand")
        return extensions
