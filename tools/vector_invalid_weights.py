"""Invalid vectors of NF4 weights, rules N01 to N08."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import vector_nf4 as nf4
from vector_bundle import (
    NORM,
    UP,
    Draft,
    Stored,
)
from vector_drafts import (
    MAP,
    NESTED_MAP,
    STATE,
    changed,
    dense,
    part,
    put,
    quantized,
    reformed,
    remove,
    repaired,
    swap,
)


def weight_rules() -> Iterator[tuple[str, str, str, Draft]]:
    """Yield rule, name, how it is made, and the draft, of N01 to N08."""
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
