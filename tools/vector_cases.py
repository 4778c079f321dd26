"""The list of test vectors: valid bundles, and bundles that break exactly one rule each."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from hashlib import sha256
from typing import Any

import vector_nf4 as nf4
from vector_bundle import (
    INDEX,
    NORM,
    QUANTIZATION,
    UP,
    Draft,
    Json,
    Stored,
    build,
    fingerprint,
    record,
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


def valid() -> Iterator[tuple[str, str, Draft]]:
    """Yield name, how it is made, and the draft."""
    yield "dense-only", "one plain float32 tensor and a carried file", dense()
    every = Draft()
    for dtype, size in SIZES.items():
        every.dense(f"a.{dtype.lower()}", dtype, [3, 1], bytes(range(3 * size)))
    every.dense("empty", "F32", [0, 7], b"").dense("scalar", "F32", [], floats(1))
    yield "dense-dtypes", "one tensor of each dtype, an empty one and a scalar", every
    yield "nf4-double-quant", "NF4 with double quantization, bfloat16, block 64", quantized()
    yield "nf4-plain", "NF4 without double quantization", quantized(double_quant=False)
    yield "nf4-float16", "decodes to float16", quantized(dtype="F16")
    yield "nf4-float32", "decodes to float32", quantized(dtype="F32")
    yield (
        "nf4-tail-block",
        "3 x 40 elements: rows are not whole blocks, the last block has 56",
        quantized(shape=[3, 40]),
    )
    yield (
        "nf4-odd-count",
        "5 x 13 elements: the last byte holds one code and the padding 7",
        quantized(shape=[5, 13]),
    )
    yield (
        "nf4-block-32",
        "block 32; 257 scales, so that the second level has a tail too",
        quantized(shape=[257, 32], block_size=32),
    )
    yield "nf4-block-128", "block 128", quantized(shape=[4, 96], block_size=128)
    yield (
        "nf4-block-4096",
        "block 4096, and a tail of 2",
        quantized(shape=[2, 2049], block_size=4096),
    )
    zeros = nf4.sample([2, 64], "up")[:64] + [0.0] * 64
    yield "nf4-zero-block", "the second block is all zero", quantized(values=zeros)
    yield (
        "nf4-zero-block-plain",
        "the same without double quantization",
        quantized(values=zeros, double_quant=False),
    )
    yield (
        "nf4-transposed",
        "a Conv1D weight of 6 x 32: the codes run over 32 x 6",
        quantized(shape=[6, 32], transposed=True),
    )
    yield "nf4-one-dimension", "a weight with one dimension", quantized(shape=[100])
    large = nf4.round_to([x * 2e6 for x in nf4.sample([2, 64], "up")], "F16")
    yield "nf4-float16-overflow", "decoded scales beyond float16 round to infinity", overflow(large)
    yield "nf4-negative-scale", "a scale may be negative: codes are what they are", negative()
    mixed = Draft().weight(UP, nf4.Weight([2, 64], nf4.sample([2, 64], "up")))
    down = UP.replace("up", "down")
    mixed.weight(down, nf4.Weight([2, 64], nf4.sample([2, 64], "down"), double_quant=False))
    yield (
        "nf4-mixed",
        "one weight with and one without double quantization",
        mixed.arrange().with_config(),
    )
    yield (
        "several-shards",
        "three shards of one layer each",
        layers([(0, 0, "a"), (0, 0, "b"), (1, 1, "a"), (1, 1, "b"), (2, 2, "a")], limit=32),
    )
    yield (
        "layer-over-limit",
        "a layer of 48 bytes with a limit of 32 lies in two shards",
        layers([(0, 0, "a"), (0, 0, "b"), (1, 0, "c")], limit=32),
    )
    yield "adapter", "an adapter that names its base", with_adapter()
    extended = dense()
    extended.extensions = {"example.org/notes": {"must_understand": False, "note": "harmless"}}
    yield "ignorable-extension", "an extension that need not be understood", extended
    newer = dense()
    newer.manifest = newer_minor
    yield "newer-minor", "format version 1.7 with members that 1.0 does not know", newer
    carried = dense()
    carried.files["1_Pooling/config.json"] = b'{"word_embedding_dimension": 4}\n'
    carried.files["LICENSE"] = b"Apache-2.0\n"
    yield "carried-subdirectory", "carried files, one in a subdirectory", carried
    unicode = (
        Draft()
        .dense("модель.重み.weight", "F32", [4], floats(4))
        .dense("z\U0001f40d", "U8", [1], b"x")
    )
    yield "unicode-name", "tensor names beyond ASCII, and beyond the basic plane", unicode


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


def parts_of(draft: Draft) -> nf4.Parts:
    """Return the parts of the NF4 weight."""
    return {
        s.name.removeprefix(UP): (s.dtype, s.shape, s.data)
        for stored in draft.shards
        for s in stored
        if s.name.startswith(UP)
    }


def repaired(draft: Draft) -> Draft:
    """Recompute the SHA-256 of the NF4 weight after its parts were changed."""
    draft.records[UP]["sha256"] = nf4.digest(parts_of(draft))
    return draft


def reformed(change: Callable[[Json], Any], **options: Any) -> Draft:
    """Return a bundle whose quant state was changed, and its hash repaired."""
    draft = quantized(**options)
    state = part(draft, STATE)
    fields = json.loads(state.data)
    changed = change(fields)
    state.data = json.dumps(fields if changed is None else changed).encode()
    state.shape = [len(state.data)]
    return repaired(draft)


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


Case = tuple[str, str, str, str, Draft]


def invalid() -> Iterator[Case]:
    """Yield name, rule, reason, how it is made, and the draft."""
    for rule, name, how, draft in _invalid():
        yield f"{rule.lower()}-{name}", rule, REASONS[rule], how, draft


REASONS = {
    "A01": "an adapter computes something else on another base",
    "A02": "PEFT would read another config than was checked, or none",
    "B01": "without a manifest a directory is not a bundle",
    "B02": "other programs load every shard they find, or miss one",
    "B03": "other programs find the shards through the index",
    "B04": "other programs would load another tensor, or leave the directory",
    "B05": "a file was lost or cut on the way",
    "B06": "other programs would read codes as weights",
    "B07": "other programs plan memory by this number",
    "B08": "other programs obey a config that nobody vouches for",
    "H01": "a length before the header must not decide how much is read",
    "H02": "a file that begins or ends otherwise may be two formats at once",
    "H03": "two parsers may read it differently",
    "H04": "the safetensors library refuses it",
    "H05": "names become file names, patterns and terminal output",
    "H06": "the entry does not describe a tensor",
    "H07": "a shape larger than its bytes reads beyond them",
    "H08": "tensors share bytes, or bytes belong to nobody",
    "H09": "the file was cut, or something was appended",
    "H10": "two tensors of one name: readers differ on which one counts",
    "L01": "the body does not begin on a page",
    "L02": "a reader that walks over the header jumps about in the file",
    "L03": "the maps and states lie inside a layer's range",
    "L04": "a layer is not one range",
    "L05": "layers do not lie in the order in which they compute",
    "L06": "a layer is split though it fits",
    "M01": "two parsers may read it differently",
    "M02": "it may be some other program's file",
    "M03": "nobody knows what another major version means",
    "M04": "a member is missing, unknown or of the wrong type",
    "M05": "the record does not describe a tensor",
    "M06": "hashes are compared as text",
    "M07": "shard names are fixed by their number",
    "M08": "a path leads out of the directory, or over the bundle's own files",
    "M09": "adapter names become directory names",
    "M10": "adapters recognize their base by the fingerprint",
    "M11": "whoever does not know the extension would compute something else",
    "M12": "the bundle cannot be stored where case does not count",
    "N01": "a part of the weight is missing, or has no weight",
    "N02": "the codes do not fit the shape",
    "N03": "scales, maps or state do not fit the shape",
    "N04": "another table gives other weights",
    "N05": "two parsers may read the state differently, or it is not one",
    "N06": "it is another quantization",
    "N07": "it is another double quantization",
    "N08": "manifest and shards describe different weights",
    "V01": "the weight was changed or damaged",
    "V02": "the header was changed or damaged",
    "V03": "the file was changed or damaged",
    "V04": "NaN and infinity spread over a whole block",
    "V05": "two files with equal weights would differ",
}


def _invalid() -> Iterator[tuple[str, str, str, Draft]]:
    yield from _bundle_rules()
    yield from _header_rules()
    yield from _layout_rules()
    yield from _manifest_rules()
    yield from _weight_rules()
    yield from _hash_rules()


def _bundle_rules() -> Iterator[tuple[str, str, str, Draft]]:
    yield (
        "B01",
        "no-manifest",
        "loraformat.json is absent",
        changed(dense(), directory=drop("loraformat.json")),
    )
    yield (
        "B02",
        "shard-missing",
        "the second of two shards is absent",
        changed(
            layers([(0, 0, "a"), (1, 1, "a")]), directory=drop("model-00002-of-00002.safetensors")
        ),
    )
    yield (
        "B02",
        "stray-shard",
        "another .safetensors file beside the shard",
        changed(
            dense(), directory=lambda files: files.update({"model.safetensors": files[ONE_SHARD]})
        ),
    )
    yield "B03", "missing", "the index is absent", changed(dense(), directory=drop(INDEX))
    yield (
        "B03",
        "duplicate-key",
        "weight_map stands twice",
        changed(dense(), index_text=swap(b'"weight_map"', b'"weight_map": {}, "weight_map"')),
    )
    yield (
        "B03",
        "no-weight-map",
        "weight_map is a list",
        changed(dense(), index=put("weight_map", value=[])),
    )
    yield (
        "B04",
        "wrong-shard",
        "two tensors are exchanged",
        changed(layers([(0, 0, "a"), (1, 1, "a")]), index=exchange),
    )
    yield (
        "B04",
        "parent-path",
        "the shard is ../b04-parent-path/model-...",
        changed(dense(), index=put("weight_map", NORM, value=f"../b04-parent-path/{ONE_SHARD}")),
    )
    yield (
        "B04",
        "tensor-missing",
        "weight_map is empty",
        changed(dense(), index=put("weight_map", value={})),
    )
    yield (
        "B04",
        "tensor-unknown",
        "weight_map names a tensor that is not there",
        changed(dense(), index=put("weight_map", "ghost", value=ONE_SHARD)),
    )
    yield (
        "B05",
        "file-missing",
        "tokenizer.json is absent",
        changed(dense(), directory=drop("tokenizer.json")),
    )
    yield (
        "B05",
        "file-longer",
        "tokenizer.json has a byte more than the manifest says",
        changed(
            dense(), directory=lambda files: files.update({"tokenizer.json": TOKENIZER + b"\n"})
        ),
    )
    yield (
        "B05",
        "shard-size",
        "the manifest gives the shard a byte more",
        changed(
            dense(),
            manifest=lambda m: put("shards", 0, "bytes", value=m["shards"][0]["bytes"] + 1)(m),
        ),
    )
    yield (
        "B06",
        "no-quantization-config",
        "config.json does not mention the quantization",
        recast(None),
    )
    yield (
        "B06",
        "fp4",
        "config.json says fp4",
        recast(QUANTIZATION | {"bnb_4bit_quant_type": "fp4"}),
    )
    yield (
        "B06",
        "8-bit",
        "config.json does not say load_in_4bit",
        recast(QUANTIZATION | {"load_in_4bit": False}),
    )
    spurious = dense()
    spurious.files["config.json"] = text({"quantization_config": QUANTIZATION})
    yield "B06", "nothing-quantized", "a quantization_config without an NF4 weight", spurious
    broken = dense()
    broken.files["config.json"] = b'{"vocab_size": NaN}\n'
    yield "B06", "not-json", "config.json holds NaN", broken
    yield (
        "B07",
        "total-size",
        "total_size is one byte too large",
        changed(dense(), index=put("metadata", "total_size", value=17)),
    )
    yield (
        "B08",
        "config-unlisted",
        "config.json lies there, but not in files",
        changed(dense(), directory=lambda files: files.update({"config.json": b"{}\n"})),
    )


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


def _header_rules() -> Iterator[tuple[str, str, str, Draft]]:
    yield (
        "H01",
        "length-too-large",
        "the header's length reaches beyond the file",
        changed(dense(), shard=lambda data: (len(data) - 7).to_bytes(8, "little") + data[8:]),
    )
    yield (
        "H01",
        "length-huge",
        "the header's length is 2^63",
        changed(dense(), shard=lambda data: (1 << 63).to_bytes(8, "little") + data[8:]),
    )
    yield (
        "H01",
        "short-file",
        "the shard has 7 bytes",
        changed(dense(), shard=lambda data: data[:7]),
    )
    yield (
        "H02",
        "leading-space",
        "the header begins with a space",
        changed(dense(), header_text=lambda raw: b" " + raw[:-1]),
    )
    yield (
        "H02",
        "newline-padding",
        "the header is padded with newlines",
        changed(dense(), header_text=lambda raw: raw.rstrip().ljust(len(raw), b"\n")),
    )
    yield (
        "H03",
        "duplicate-key",
        "the tensor stands twice in the header",
        changed(dense(), header_text=lambda raw: twice(raw)),
    )
    yield (
        "H03",
        "not-utf-8",
        "a byte 0xff in a metadata value",
        changed(dense(), header_text=swap(b'"pt"', b'"\xfft"')),
    )
    yield (
        "H03",
        "surrogate",
        "half a surrogate pair in a metadata value",
        changed(dense(), header_text=lambda raw: raw.replace(b'"pt"', b'"\\ud800"', 1)[: len(raw)]),
    )
    yield (
        "H04",
        "number",
        "a metadata value is a number",
        changed(dense(), header=put("__metadata__", "format", value=1)),
    )
    yield "H05", "slash", "a tensor is called a/b", named("a/b")
    yield "H05", "escape", "a tensor name holds an ESC character", named("a\x1b[31m")
    yield "H05", "long", "a tensor name of 513 bytes", named("a" * 513)
    yield "H05", "bidi", "a tensor name holds a right-to-left override", named("a\u202eb")
    yield (
        "H06",
        "extra-member",
        "an entry has a fourth member",
        changed(dense(), header=put(NORM, "strides", value=[1])),
    )
    yield (
        "H06",
        "unknown-dtype",
        "dtype F128",
        changed(dense(), header=put(NORM, "dtype", value="F128")),
    )
    yield (
        "H06",
        "boolean-dimension",
        "a dimension is true",
        changed(
            Draft().dense(NORM, "F32", [1, 4], floats(4)),
            header=put(NORM, "shape", value=[True, 4]),
        ),
    )
    yield (
        "H06",
        "nine-dimensions",
        "nine dimensions",
        changed(dense(), header=put(NORM, "shape", value=[1] * 8 + [4])),
    )
    yield (
        "H07",
        "shape-too-large",
        "the shape takes 20 bytes, the entry has 16",
        changed(dense(), header=put(NORM, "shape", value=[5])),
    )
    yield (
        "H07",
        "product-overflow",
        "dimensions whose product is 16 modulo 2^64",
        changed(dense(), header=put(NORM, "shape", value=[(1 << 47) + 1, 1 << 47, 4])),
    )
    yield "H08", "overlap", "two tensors share 8 bytes", moved([0, 16], [8, 24], floats(6))
    yield "H08", "hole", "8 bytes between two tensors", moved([0, 16], [24, 40], floats(10))
    yield (
        "H08",
        "late-start",
        "the first tensor begins at data byte 8",
        moved([8, 24], [24, 40], floats(10)),
    )
    yield (
        "H09",
        "trailing-byte",
        "a byte behind the last tensor",
        changed(dense(), shard=lambda data: data + b"\0"),
    )
    yield (
        "H09",
        "truncated",
        "the last byte of the shard is cut off",
        changed(dense(), shard=lambda data: data[:-1]),
    )
    yield (
        "H10",
        "same-name",
        "both shards hold model.norm.weight",
        Draft().dense(NORM, "F32", [4], floats(4)).dense(NORM, "F32", [4], floats(4), 1),
    )


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


def _layout_rules() -> Iterator[tuple[str, str, str, Draft]]:
    yield (
        "L01",
        "unaligned",
        "the data begins at a multiple of 8, not of 4096",
        changed(dense(), alignment=8),
    )
    yield (
        "L02",
        "header-order",
        "the header lists the tensors backwards",
        changed(
            Draft().dense("a", "F32", [4], floats(4)).dense("b", "F32", [4], floats(4)),
            header=lambda fields: dict(reversed(fields.items())),
        ),
    )
    early = quantized()
    early.shards[0].sort(key=lambda s: s.name != MAP)
    yield "L03", "tail-first", "the quant map lies before the codes", early
    split = layers([(0, 0, "a"), (0, 1, "a"), (0, 0, "b")])
    yield "L04", "two-ranges", "layer 1 lies between two tensors of layer 0", split
    interrupted = layers([(0, 0, "a")]).dense(NORM, "F32", [4], floats(4))
    interrupted.dense("model.layers.0.b.weight", "F32", [4], floats(4))
    yield "L04", "interrupted", "the final norm lies between two tensors of layer 0", interrupted
    yield "L05", "descending", "layer 1 lies before layer 0", layers([(0, 1, "a"), (0, 0, "a")])
    yield (
        "L06",
        "needless-split",
        "a layer of 32 bytes with a limit of 32 lies in two shards",
        layers([(0, 0, "a"), (1, 0, "b")], limit=32),
    )


def _manifest_rules() -> Iterator[tuple[str, str, str, Draft]]:
    yield (
        "M01",
        "duplicate-key",
        "shard_limit stands twice",
        changed(dense(), manifest_text=swap(b'"shard_limit"', b'"shard_limit": 1, "shard_limit"')),
    )
    yield (
        "M01",
        "infinity",
        "shard_limit is Infinity",
        changed(dense(), manifest_text=swap(b"2000000000", b"Infinity")),
    )
    yield (
        "M01",
        "deep",
        "an extension is nested 40 levels deep",
        changed(
            dense(),
            manifest_last=put(
                "extensions", "deep", value={"must_understand": False, "x": nested(40)}
            ),
        ),
    )
    yield (
        "M02",
        "other-format",
        "format is another word",
        changed(dense(), manifest_last=put("format", value="adapterformat")),
    )
    yield (
        "M03",
        "major",
        "format version 2.0",
        changed(dense(), manifest_last=put("format_version", value="2.0")),
    )
    yield (
        "M03",
        "malformed",
        "format version 1.00",
        changed(dense(), manifest_last=put("format_version", value="1.00")),
    )
    yield (
        "M03",
        "number",
        "format version is a number",
        changed(dense(), manifest_last=put("format_version", value=1.0)),
    )
    yield (
        "M04",
        "missing-member",
        "extensions is absent",
        changed(dense(), manifest_last=remove("extensions")),
    )
    yield (
        "M04",
        "unknown-member",
        "version 1.0 with a member that 1.0 does not have",
        changed(dense(), manifest_last=put("licence", value="Apache-2.0")),
    )
    yield (
        "M04",
        "float-limit",
        "shard_limit is 1.5",
        changed(dense(), manifest_last=put("shard_limit", value=1.5)),
    )
    yield (
        "M04",
        "source-member",
        "source has an unknown member",
        changed(dense(), manifest_last=put("source", "licence", value="Apache-2.0")),
    )
    yield (
        "M04",
        "control-character",
        "created_by holds an ESC character",
        changed(dense(), manifest_last=put("created_by", value="\x1b[2J")),
    )
    yield (
        "M05",
        "encoding",
        "encoding awq",
        changed(dense(), manifest=put("tensors", NORM, "encoding", value="awq")),
    )
    yield (
        "M05",
        "dtype",
        "an NF4 weight that decodes to F64",
        changed(quantized(), manifest=put("tensors", UP, "dtype", value="F64")),
    )
    yield (
        "M05",
        "missing-member",
        "an NF4 weight without block_size",
        changed(quantized(), manifest=remove("tensors", UP, "block_size")),
    )
    yield (
        "M05",
        "transposed",
        "a transposed weight with three dimensions",
        changed(quantized(shape=[2, 8, 8]), manifest=put("tensors", UP, "transposed", value=True)),
    )
    yield (
        "M06",
        "uppercase",
        "the SHA-256 of a file in capitals",
        changed(
            dense(),
            manifest_last=lambda m: put(
                "files",
                "tokenizer.json",
                "sha256",
                value=m["files"]["tokenizer.json"]["sha256"].upper(),
            )(m),
        ),
    )
    yield (
        "M06",
        "short",
        "the SHA-256 of a header has 63 digits",
        changed(
            dense(),
            manifest_last=lambda m: put(
                "shards", 0, "header_sha256", value=m["shards"][0]["header_sha256"][:-1]
            )(m),
        ),
    )
    yield (
        "M07",
        "name",
        "the shard is called model-1-of-1",
        changed(
            dense(),
            index=put("weight_map", NORM, value="model-1-of-1.safetensors"),
            manifest=put("shards", 0, "file", value="model-1-of-1.safetensors"),
            directory=lambda files: files.update(
                {"model-1-of-1.safetensors": files.pop(ONE_SHARD)}
            ),
        ),
    )
    yield "M07", "empty", "no shards, no tensors", Draft()
    yield (
        "M08",
        "parent-path",
        "a carried file ../m08-parent-path/tokenizer.json",
        changed(
            dense(),
            manifest=lambda m: m.update(
                files={"../m08-parent-path/tokenizer.json": record(TOKENIZER)}
            ),
        ),
    )
    hidden = dense()
    hidden.files[".hidden"] = b"x\n"
    yield "M08", "hidden", "a carried file whose name begins with a dot", hidden
    index = dense()
    yield (
        "M08",
        "own-file",
        "the index as a carried file",
        changed(index, manifest=lambda m: m["files"].update({INDEX: record(index_of(dense()))})),
    )
    yield (
        "M08",
        "extra-member",
        "a file record with a third member",
        changed(dense(), manifest=put("files", "tokenizer.json", "mode", value=420)),
    )
    odd = with_adapter()
    odd.adapters["_poet"] = odd.adapters.pop("poet")
    yield "M09", "name", "an adapter called _poet", odd
    bare = with_adapter()
    del bare.adapters["poet"]["adapter_config.json"]
    yield "M09", "no-config", "an adapter without adapter_config.json", bare
    yield (
        "M10",
        "fingerprint",
        "the fingerprint of another base",
        changed(
            dense(), manifest_last=put("fingerprint", value=sha256(b"another base").hexdigest())
        ),
    )
    for name, body in (
        ("default", {}),
        ("true", {"must_understand": True}),
        ("null", {"must_understand": None}),
    ):
        how = f"an extension whose must_understand is {'absent' if not body else name}"
        yield (
            "M11",
            name,
            how,
            changed(dense(), manifest_last=put("extensions", "example.org/x", value=body)),
        )
    yield (
        "M12",
        "case",
        (
            "tokenizer.json and Tokenizer.json in files; the second is left out of the directory, "
            "so that the vector can be stored where case does not count"
        ),
        changed(
            dense(), manifest=lambda m: m["files"].update({"Tokenizer.json": record(TOKENIZER)})
        ),
    )


def index_of(draft: Draft) -> bytes:
    """Return the index that a draft gets."""
    return build(draft)[INDEX]


def nested(depth: int) -> Any:
    """Return lists in lists."""
    value: list[Any] = []
    for _ in range(depth - 1):
        value = [value]
    return value


def _weight_rules() -> Iterator[tuple[str, str, str, Draft]]:
    lost = quantized()
    lost.shards[0].remove(part(lost, UP + ".nested_absmax"))
    yield "N01", "missing-part", "the second-level scales are absent", repaired(lost)
    extra = quantized(double_quant=False)
    extra.shards[0].append(Stored(NESTED_MAP, "F32", [256], nf4.pack(nf4.scale_map(), "F32")))
    yield "N01", "extra-part", "a nested map without double quantization", repaired(extra.arrange())
    stray = dense().dense("b.weight.absmax", "U8", [1], b"\0")
    yield "N01", "stray-part", "scales without a quant state", stray
    short = quantized()
    part(short, UP).shape = [64]
    yield "N02", "shape", "the codes have shape [64], wanted [64, 1]", repaired(short)
    cut = quantized()
    codes = part(cut, UP)
    codes.data, codes.shape = codes.data[:-1], [63, 1]
    yield "N02", "short", "63 bytes of codes for 128 elements", repaired(cut)
    scales = quantized()
    absmax = part(scales, UP + ".absmax")
    absmax.data, absmax.shape = absmax.data + b"\0", [3]
    yield "N03", "too-many-scales", "three scales for two blocks", repaired(scales)
    rounded = quantized()
    levels = list(struct.unpack("<16f", part(rounded, MAP).data))
    part(rounded, MAP).data = nf4.pack([round(level, 4) for level in levels], "F32")
    yield "N04", "rounded-levels", "the 16 levels rounded to four digits", repaired(rounded)
    other = quantized()
    part(other, NESTED_MAP).data = bytes([1]) + part(other, NESTED_MAP).data[1:]
    yield "N04", "scale-map", "the first entry of the scale map is off by ulps", repaired(other)
    yield (
        "N05",
        "unknown-member",
        "the state has an unknown member",
        reformed(put("zero_point", value=0)),
    )
    yield "N05", "partial-nesting", "nested_dtype is absent", reformed(remove("nested_dtype"))
    state = quantized()
    part(state, STATE).data = swap(b'"nf4", ', b'"nf4", "blocksize": 32, ')(part(state, STATE).data)
    part(state, STATE).shape = [len(part(state, STATE).data)]
    yield "N05", "duplicate-key", "blocksize stands twice", repaired(state)
    yield "N06", "fp4", "quant_type fp4", reformed(put("quant_type", value="fp4"))
    yield "N06", "block-size", "a block of 48", reformed(put("blocksize", value=48))
    yield "N06", "dtype", "decodes to float64", reformed(put("dtype", value="float64"))
    yield (
        "N07",
        "nested-block-size",
        "second-level blocks of 128",
        reformed(put("nested_blocksize", value=128)),
    )
    yield (
        "N07",
        "nested-dtype",
        "second-level scales in float16",
        reformed(put("nested_dtype", value="float16")),
    )
    yield (
        "N07",
        "offset",
        "an offset that float32 cannot hold",
        reformed(put("nested_offset", value=0.1)),
    )
    yield (
        "N07",
        "offset-range",
        "an offset beyond float32",
        reformed(put("nested_offset", value=1e39)),
    )
    yield (
        "N08",
        "shape",
        "the manifest says 64 x 2, the state 2 x 64",
        changed(quantized(), manifest=put("tensors", UP, "shape", value=[64, 2])),
    )
    yield (
        "N08",
        "block-size",
        "the manifest says block 128, the state 64",
        changed(quantized(), manifest=put("tensors", UP, "block_size", value=128)),
    )
    yield (
        "N08",
        "not-in-shards",
        "the manifest lists a tensor that no shard holds",
        changed(dense(), manifest=lambda m: m["tensors"].update(ghost=m["tensors"][NORM])),
    )
    yield (
        "N08",
        "not-in-manifest",
        "a shard holds a tensor that the manifest does not list",
        changed(dense().dense("ghost", "U8", [1], b"x"), manifest=remove("tensors", "ghost")),
    )


def _hash_rules() -> Iterator[tuple[str, str, str, Draft]]:
    yield (
        "V01",
        "dense",
        "the last bit of a plain tensor is flipped",
        changed(dense(), shard=flip_last),
    )
    nf4_draft = quantized()
    codes = part(nf4_draft, UP)
    codes.data = bytes([codes.data[0] ^ 16]) + codes.data[1:]
    yield "V01", "codes", "one 4-bit code is off by one", nf4_draft
    spaced = quantized()
    state = part(spaced, STATE)
    state.data = state.data + b" "
    state.shape = [len(state.data)]
    yield "V01", "state", "a space behind the quant state", spaced
    yield (
        "V02",
        "header",
        "a metadata value of the header is changed",
        changed(dense(), shard=swap(b'"pt"', b'"tp"')),
    )
    yield (
        "V03",
        "file",
        "a byte of a carried file is changed",
        changed(
            dense(),
            directory=lambda files: files.update({"tokenizer.json": TOKENIZER.replace(b"1", b"2")}),
        ),
    )
    yield (
        "V03",
        "adapter",
        "a byte of an adapter is changed",
        changed(
            with_adapter(),
            directory=lambda files: files.update(
                {
                    "adapters/poet/adapter_model.safetensors": flip_last(
                        files["adapters/poet/adapter_model.safetensors"]
                    )
                }
            ),
        ),
    )
    for name, value in (("nan", float("nan")), ("infinite", float("inf"))):
        spoiled = quantized()
        part(spoiled, UP + ".nested_absmax").data = struct.pack("<f", value)
        yield "V04", f"{name}-nested", f"a second-level scale is {value}", repaired(spoiled)
    plain = quantized(double_quant=False)
    part(plain, UP + ".absmax").data = struct.pack("<2f", 1.0, float("nan"))
    yield "V04", "nan-scale", "a scale is NaN", repaired(plain)
    largest = nf4.f32((2 - 2**-23) * 2.0**127)
    sums = reformed(put("nested_offset", value=largest))
    part(sums, UP + ".nested_absmax").data = struct.pack("<f", largest)
    part(sums, UP + ".absmax").data = bytes([255, 127])
    yield "V04", "overflow", "both summands of a scale are finite, the scale is not", repaired(sums)
    odd = quantized(shape=[5, 13])
    codes = part(odd, UP)
    codes.data = codes.data[:-1] + bytes([codes.data[-1] & 0xF0])
    yield "V05", "padding", "an odd count is padded with code 0", repaired(odd)
    yield (
        "A01",
        "base",
        "an adapter that names another base",
        with_adapter(sha256(b"another base").hexdigest()),
    )
    duplicate = with_adapter()
    config = duplicate.adapters["poet"]["adapter_config.json"]
    duplicate.adapters["poet"]["adapter_config.json"] = config.replace(b'"r": 1', b'"r": 1, "r": 2')
    yield "A02", "duplicate-key", "the adapter's config gives r twice", duplicate


def flip_last(data: bytes) -> bytes:
    """Flip the last bit."""
    return data[:-1] + bytes([data[-1] ^ 1])
