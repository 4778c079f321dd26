"""The invalid vectors: for each rule, bundles that break it and no other."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from hashlib import sha256

import vector_nf4 as nf4
from vector_bundle import (
    INDEX,
    NORM,
    QUANTIZATION,
    UP,
    Draft,
    text,
)
from vector_drafts import (
    MAP,
    ONE_SHARD,
    STATE,
    TOKENIZER,
    changed,
    dense,
    drop,
    exchange,
    flip_last,
    floats,
    layers,
    part,
    put,
    quantized,
    recast,
    reformed,
    repaired,
    swap,
    with_adapter,
)
from vector_invalid_headers import header_rules
from vector_invalid_manifests import manifest_rules
from vector_invalid_segments import segment_rules
from vector_invalid_weights import weight_rules

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
    "M13": "a reader of version 1.0 must refuse it, or none need",
    "N01": "a part of the weight is missing, or has no weight",
    "N02": "the codes do not fit the shape",
    "N03": "scales, maps or state do not fit the shape",
    "N04": "another table gives other weights",
    "N05": "two parsers may read the state differently, or it is not one",
    "N06": "it is another quantization",
    "N07": "it is another double quantization",
    "N08": "manifest and shards describe different weights",
    "N09": "a segment is not a number of whole rows of one matrix",
    "V01": "the weight was changed or damaged",
    "V02": "the header was changed or damaged",
    "V03": "the file was changed or damaged",
    "V04": "NaN and infinity spread over a whole block",
    "V05": "two files with equal weights would differ",
}


def _invalid() -> Iterator[tuple[str, str, str, Draft]]:
    yield from _bundle_rules()
    yield from header_rules()
    yield from _layout_rules()
    yield from manifest_rules()
    yield from weight_rules()
    yield from segment_rules()
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
    broken.files["config.json"] = b'{"vocab_size": None}\n'
    yield "B06", "not-json", "config.json holds a word that is no JSON", broken
    deep = dense()
    deep.files["config.json"] = b'{"vocab_size": ' + b"[" * 128 + b"]" * 128 + b"}\n"
    yield "B06", "too-deep", "config.json is nested 129 deep", deep
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
    listed = with_adapter()
    listed.adapters["poet"]["adapter_config.json"] = b"[]\n"
    yield "A02", "not-an-object", "the adapter's config is a list", listed
