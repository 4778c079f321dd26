"""Bundles built byte by byte for the test vectors, sound or spoiled in one place.

This shares no code with the package, so that a mistake in one is not a mistake in both.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import vector_nf4 as nf4

INDEX = "model.safetensors.index.json"
UP = "model.layers.0.mlp.up_proj.weight"
NORM = "model.norm.weight"
EXPERTS = "model.layers.0.mlp.experts.gate_up_proj"
SEGMENTS = "pypi.org/project/loraformat/segments"

Json = dict[str, Any]


@dataclass
class Stored:
    """One tensor of a shard."""

    name: str
    dtype: str
    shape: list[int]
    data: bytes


@dataclass
class Draft:
    """A bundle before its bytes; a hook of each kind may spoil one thing on the way."""

    shards: list[list[Stored]] = field(default_factory=list)
    records: dict[str, Json] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    adapters: dict[str, dict[str, bytes]] = field(default_factory=dict)
    values: dict[str, list[float]] = field(default_factory=dict)
    shard_limit: int = 2_000_000_000
    extensions: Json = field(default_factory=dict)
    version: str = "1.0"
    metadata: dict[str, str] = field(default_factory=lambda: {"format": "pt"})
    alignment: int = 4096
    #: Spoils the header's JSON object, the header's text, a whole shard (per shard).
    header: Callable[[Json], Any] | None = None
    header_text: Callable[[bytes], bytes] | None = None
    shard: Callable[[bytes], bytes] | None = None
    #: Spoils the index, its text, the manifest before and after its fingerprint, its text.
    index: Callable[[Json], Any] | None = None
    index_text: Callable[[bytes], bytes] | None = None
    manifest: Callable[[Json], Any] | None = None
    manifest_last: Callable[[Json], Any] | None = None
    manifest_text: Callable[[bytes], bytes] | None = None
    #: Spoils the finished directory.
    directory: Callable[[dict[str, bytes]], Any] | None = None

    def dense(self, name: str, dtype: str, shape: list[int], data: bytes, shard: int = 0) -> Draft:
        """Add a plain tensor."""
        self._shard(shard).append(Stored(name, dtype, shape, data))
        self.records[name] = {
            "encoding": "dense",
            "dtype": dtype,
            "shape": shape,
            "sha256": sha256(data).hexdigest(),
        }
        return self

    def weight(self, name: str, weight: nf4.Weight, shard: int = 0) -> Draft:
        """Add an NF4 weight; `arrange` moves its maps and its state to the tail."""
        parts = nf4.encode(weight)
        for suffix, (dtype, shape, data) in parts.items():
            self._shard(shard).append(Stored(name + suffix, dtype, shape, data))
        self.values[name] = nf4.decode(weight, parts)
        self.records[name] = {
            "encoding": "nf4",
            "dtype": weight.dtype,
            "shape": weight.shape,
            "block_size": weight.block_size,
            "double_quant": weight.double_quant,
            "transposed": weight.transposed,
            "relative_rms_error": nf4.relative_error(weight, self.values[name]),
            "sha256": nf4.digest(parts),
        }
        if weight.segments is not None:
            self.records[name]["segments"] = weight.segments
            self.version, self.extensions[SEGMENTS] = "1.1", {"must_understand": True}
        return self

    def _shard(self, number: int) -> list[Stored]:
        while len(self.shards) <= number:
            self.shards.append([])
        return self.shards[number]

    def arrange(self) -> Draft:
        """Move maps and quant states behind everything else, as rule L03 wants."""
        tail = {suffix: place for place, suffix in enumerate(nf4.TAIL, 1)}
        for stored in self.shards:
            stored.sort(key=lambda s: next((p for t, p in tail.items() if s.name.endswith(t)), 0))
        return self

    def with_config(self) -> Draft:
        """Add the ``config.json`` that tells peers the quantization."""
        config: Json = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
        if any(record["encoding"] == "nf4" for record in self.records.values()):
            config["quantization_config"] = OWN if SEGMENTS in self.extensions else QUANTIZATION
        self.files["config.json"] = text(config)
        return self


QUANTIZATION = {
    "bnb_4bit_compute_dtype": "float32",
    "bnb_4bit_quant_storage": "uint8",
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "load_in_4bit": True,
    "load_in_8bit": False,
    "quant_method": "bitsandbytes",
}
#: Of a bundle with segments.
OWN = {key: value for key, value in QUANTIZATION.items() if not key.startswith("load_in")}
OWN["quant_method"] = "loraformat (import loraformat.transformers)"


def text(value: Any) -> bytes:
    """Return readable JSON."""
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def spoil(hook: Callable[[Any], Any] | None, value: Any) -> Any:
    """Apply a hook, which changes its argument or returns another."""
    changed = hook(value) if hook else None
    return value if changed is None else changed


def record(data: bytes) -> Json:
    """Return a file's record in a manifest."""
    return {"bytes": len(data), "sha256": sha256(data).hexdigest()}


def build(draft: Draft) -> dict[str, bytes]:
    """Return the files of a bundle, by path."""
    out = dict(draft.files)
    shards: list[Json] = []
    weight_map: dict[str, str] = {}
    total = 0
    for number, stored in enumerate(draft.shards, 1):
        name = f"model-{number:05}-of-{len(draft.shards):05}.safetensors"
        out[name], header = safetensors(stored, draft)
        shards.append(
            {"file": name, "bytes": len(out[name]), "header_sha256": sha256(header).hexdigest()}
        )
        weight_map |= {s.name: name for s in stored}
        total += sum(len(s.data) for s in stored)
    index = spoil(draft.index, {"metadata": {"total_size": total}, "weight_map": weight_map})
    out[INDEX] = spoil(draft.index_text, text(index))
    adapters = {
        name: {"files": {path: record(data) for path, data in files.items()}}
        for name, files in draft.adapters.items()
    }
    for name, files in draft.adapters.items():
        out |= {f"adapters/{name}/{path}": data for path, data in files.items()}
    manifest = {
        "format": "loraformat",
        "format_version": draft.version,
        "created_by": "tools/make_vectors.py",
        "source": {"format": "safetensors"},
        "fingerprint": "",
        "shard_limit": draft.shard_limit,
        "shards": shards,
        "tensors": draft.records,
        "files": {path: record(data) for path, data in draft.files.items()},
        "adapters": adapters,
        "extensions": draft.extensions,
    }
    manifest = spoil(draft.manifest, json.loads(json.dumps(manifest)))
    manifest["fingerprint"] = fingerprint(manifest["tensors"])
    out["loraformat.json"] = spoil(draft.manifest_text, text(spoil(draft.manifest_last, manifest)))
    spoil(draft.directory, out)
    return out


def safetensors(stored: list[Stored], draft: Draft) -> tuple[bytes, bytes]:
    """Return a safetensors file and its header."""
    fields: Json = {"__metadata__": draft.metadata} if draft.metadata else {}
    data = b""
    for s in stored:
        span = [len(data), len(data) + len(s.data)]
        fields[s.name] = {"dtype": s.dtype, "shape": s.shape, "data_offsets": span}
        data += s.data
    fields = spoil(draft.header, fields)
    raw = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    raw = raw.ljust(-(-(len(raw) + 8) // draft.alignment) * draft.alignment - 8)
    raw = spoil(draft.header_text, raw)
    header = len(raw).to_bytes(8, "little") + raw
    return spoil(draft.shard, header + data), header


def fingerprint(tensors: dict[str, Json]) -> str:
    """Return the fingerprint of a base."""
    lines = []
    for name, t in sorted(tensors.items(), key=lambda item: item[0].encode()):
        encoding = "nf4-transposed" if t.get("transposed") else t["encoding"]
        dimensions = ",".join(str(n) for n in t["shape"])
        lines.append("\t".join([name, encoding, t["dtype"], dimensions, t["sha256"]]) + "\n")
    return sha256("".join(lines).encode()).hexdigest()
