"""Bundles to make vectors from, and the changes that break them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import vector_nf4 as nf4
from vector_bundle import (
    EXPERTS,
    INDEX,
    NORM,
    UP,
    Draft,
    Json,
    Stored,
    build,
    fingerprint,
    safetensors,
    text,
)

ONE_SHARD = "model-00001-of-00001.safetensors"


TOKENIZER = b'{"version": "1.0", "added_tokens": []}\n'


STATE, MAP, NESTED_MAP = UP + nf4.TAIL[2], UP + nf4.TAIL[0], UP + nf4.TAIL[1]


def floats(count: int, seed: str = "dense") -> bytes:
    """Return float32 bytes."""
    return nf4.pack(nf4.sample([count], seed, "F32"), "F32")


def dense() -> Draft:
    """Return the smallest bundle: one plain tensor and one carried file."""
    draft = Draft().dense(NORM, "F32", [4], floats(4))
    draft.files["tokenizer.json"] = TOKENIZER
    return draft


def quantized(**options: Any) -> Draft:
    """Return a bundle with one NF4 weight of 2 x 64, a plain tensor and a config."""
    shape = options.pop("shape", [2, 64])
    dtype = options.get("dtype", "BF16")
    values = options.pop("values", None) or nf4.sample(shape, "up", dtype)
    draft = Draft().weight(UP, nf4.Weight(shape, values, **options))
    return draft.dense(NORM, "F32", [4], floats(4)).arrange().with_config()


def stacked(shape: list[int], segments: int, **options: Any) -> Draft:
    """Return a bundle with a stack of experts, a linear and a plain tensor."""
    values = nf4.sample(shape, "experts", options.get("dtype", "BF16"))
    draft = Draft().weight(EXPERTS, nf4.Weight(shape, values, segments=segments, **options))
    draft.weight(UP, nf4.Weight([2, 64], nf4.sample([2, 64], "up")))
    return draft.dense(NORM, "F32", [4], floats(4)).arrange().with_config()


def with_adapter(base: str | None = None) -> Draft:
    """Return a bundle with an adapter that names its base; the right one by default."""
    draft = quantized()
    base = base or fingerprint(draft.records)
    prefix = "base_model.model.model.layers.0.mlp.up_proj.lora_"
    factors = [
        Stored(f"{prefix}A.weight", "F32", [1, 64], floats(64, "A")),
        Stored(f"{prefix}B.weight", "F32", [2, 1], floats(2, "B")),
    ]
    metadata = {"format": "pt", "loraformat.base_fingerprint": base, "loraformat.base_source": "{}"}
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 2, "target_modules": ["up_proj"]}
    draft.adapters["poet"] = {
        "adapter_config.json": text(config),
        "adapter_model.safetensors": safetensors(factors, Draft(metadata=metadata, alignment=8))[0],
    }
    return draft


def layers(order: list[tuple[int, int, str]], limit: int = 2_000_000_000) -> Draft:
    """Return a dense bundle of layer tensors, each (shard, layer, name), 16 bytes each."""
    draft = Draft(shard_limit=limit)
    for shard, layer, name in order:
        full = f"model.layers.{layer}.{name}.weight"
        draft.dense(full, "F32", [4], floats(4, full), shard)
    return draft


SIZES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2,
    "BF16": 2, "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip


def newer_minor(manifest: Json) -> None:
    """Turn a manifest into one of a later minor version."""
    manifest["format_version"] = "1.7"
    manifest["mirrors"] = ["https://example.org"]
    manifest["source"]["licence"] = "Apache-2.0"
    manifest["tensors"][NORM]["entropy"] = 3.5
    manifest["shards"][0]["crc32c"] = 7
    manifest["files"]["tokenizer.json"]["role"] = "tokenizer"


def overflow(values: list[float]) -> Draft:
    """Scale a float16 weight's second-level scales so that values exceed 65504."""
    draft = quantized(values=values, dtype="F16", double_quant=False)
    return rescale(draft, [80000.0, 60000.0])


def negative() -> Draft:
    """Give a weight a negative scale."""
    return rescale(quantized(double_quant=False), [-0.5, 0.25])


def rescale(draft: Draft, scales: list[float]) -> Draft:
    """Replace the plain scales of the weight, and all that depends on them."""
    stored = part(draft, UP + ".absmax")
    stored.data = nf4.pack(scales, "F32")
    weight = nf4.Weight([2, 64], [], draft.records[UP]["dtype"], double_quant=False)
    parts = parts_of(draft)
    draft.values[UP] = nf4.decode(weight, parts)
    draft.records[UP]["relative_rms_error"] = None
    draft.records[UP]["sha256"] = nf4.digest(parts)
    return draft


def part(draft: Draft, name: str) -> Stored:
    """Return a stored tensor."""
    return next(s for stored in draft.shards for s in stored if s.name == name)


def parts_of(draft: Draft, name: str = UP) -> nf4.Parts:
    """Return the parts of an NF4 weight."""
    return {
        s.name.removeprefix(name): (s.dtype, s.shape, s.data)
        for stored in draft.shards
        for s in stored
        if s.name.startswith(name)
    }


def repaired(draft: Draft, name: str = UP) -> Draft:
    """Recompute the SHA-256 of an NF4 weight after its parts were changed."""
    draft.records[name]["sha256"] = nf4.digest(parts_of(draft, name))
    return draft


def reformed(
    change: Callable[[Json], Any], draft: Draft | None = None, name: str = UP, **options: Any
) -> Draft:
    """Return a bundle whose quant state was changed, and its hash repaired."""
    draft = draft or quantized(**options)
    state = part(draft, name + nf4.TAIL[2])
    fields = json.loads(state.data)
    changed = change(fields)
    state.data = json.dumps(fields if changed is None else changed).encode()
    state.shape = [len(state.data)]
    return repaired(draft, name)


def changed(draft: Draft, **hooks: Any) -> Draft:
    """Set hooks, or other members, of a draft."""
    for name, hook in hooks.items():
        setattr(draft, name, hook)
    return draft


def put(*path: Any, value: Any) -> Callable[[Any], None]:
    """Return a hook that sets a member deep in a JSON object."""

    def hook(fields: Any) -> None:
        for key in path[:-1]:
            fields = fields[key]
        fields[path[-1]] = value

    return hook


def remove(*path: Any) -> Callable[[Any], None]:
    """Return a hook that removes a member deep in a JSON object."""

    def hook(fields: Any) -> None:
        for key in path[:-1]:
            fields = fields[key]
        del fields[path[-1]]

    return hook


def swap(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    """Return a hook that replaces the first occurrence of some bytes."""
    return lambda data: data.replace(old, new, 1)


def drop(path: str) -> Callable[[Any], None]:
    """Return a hook that removes a file."""
    return remove(path)


def rename(old: str, new: str) -> Callable[[Json], Json]:
    """Return a hook that renames a member and keeps its place."""
    return lambda fields: {new if key == old else key: value for key, value in fields.items()}


def exchange(index: Json) -> None:
    """Exchange the first two shards of a weight map."""
    first, second = list(index["weight_map"])[:2]
    weight_map = index["weight_map"]
    weight_map[first], weight_map[second] = weight_map[second], weight_map[first]


def recast(quantization: Json | None) -> Draft:
    """Return a quantized bundle whose config says something else."""
    draft = quantized()
    config: Json = {"model_type": "llama"}
    if quantization is not None:
        config |= {"quantization_config": quantization}
    draft.files["config.json"] = text(config)
    return draft


def twice(raw: bytes) -> bytes:
    """Repeat the last entry of a header in the room of its padding."""
    body = raw.rstrip()
    start = body.index(b'"' + NORM.encode())
    return (body[:-1] + b"," + body[start:]).ljust(len(raw))


def named(name: str) -> Draft:
    """Return a dense bundle whose tensor has a bad name in the shard only."""
    return changed(dense(), header=rename(NORM, name))


def moved(first: list[int], second: list[int], data: bytes) -> Draft:
    """Return two tensors at the given offsets."""
    draft = Draft().dense("a", "F32", [4], floats(4)).dense("b", "F32", [4], floats(4))

    def header(fields: Json) -> None:
        fields["a"]["data_offsets"], fields["b"]["data_offsets"] = first, second

    return changed(draft, header=header, shard=lambda shard: shard[:-32] + data)


def index_of(draft: Draft) -> bytes:
    """Return the index that a draft gets."""
    return build(draft)[INDEX]


def nested(depth: int) -> Any:
    """Return lists in lists."""
    value: list[Any] = []
    for _ in range(depth - 1):
        value = [value]
    return value


def flip_last(data: bytes) -> bytes:
    """Flip the last bit."""
    return data[:-1] + bytes([data[-1] ^ 1])
