"""Invalid vectors of weights with segments: what version 1.1 adds to rules of 1.0, N09 and M13."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import vector_nf4 as nf4
from vector_bundle import EXPERTS, OWN, QUANTIZATION, SEGMENTS, UP, Draft, text
from vector_drafts import (
    changed,
    dense,
    part,
    put,
    quantized,
    reformed,
    remove,
    repaired,
    stacked,
)

Case = tuple[str, str, str, Draft]


def segment_rules() -> Iterator[Case]:
    """Yield rule, name, how it is made, and the draft."""
    yield from _manifest_rules()
    yield from _weight_rules()
    yield from _config_rules()


def _three(**options: bool) -> Draft:
    return stacked([3, 6, 32], 3, **options)


def _manifest_rules() -> Iterator[Case]:
    yield (
        "M05",
        "segments-in-1-0",
        "a manifest of version 1.0 has the member segments",
        changed(_three(), version="1.0"),
    )
    yield (
        "M05",
        "no-segments",
        "0 segments",
        changed(_three(), manifest=put("tensors", EXPERTS, "segments", value=0)),
    )
    turned = changed(quantized(), version="1.1")
    turned.records[UP] |= {"segments": 1, "transposed": True}
    yield "M05", "segments-transposed", "a weight is transposed and has segments", turned
    lost = _three()
    del lost.extensions[SEGMENTS]
    yield "M13", "absent", "segments without the extension", lost
    yield (
        "M13",
        "needless",
        "the extension without segments",
        changed(dense(), version="1.1", extensions={SEGMENTS: {"must_understand": True}}),
    )
    yield (
        "M13",
        "harmless",
        "the extension need not be understood",
        changed(_three(), manifest=put("extensions", SEGMENTS, "must_understand", value=False)),
    )


def _weight_rules() -> Iterator[Case]:
    lost = _three()
    lost.shards[0].remove(part(lost, EXPERTS + nf4.OFFSET))
    yield "N01", "missing-offsets", "the offsets are absent", repaired(lost, EXPERTS)
    flat = _three()
    part(flat, EXPERTS).shape = [288, 1]
    yield "N02", "segments-flat", "the codes have the shape of one segment", repaired(flat, EXPERTS)
    one = _three()
    offsets = part(one, EXPERTS + nf4.OFFSET)
    offsets.data, offsets.shape = offsets.data[:4], [1]
    yield "N03", "one-offset", "one offset for three segments", repaired(one, EXPERTS)
    yield (
        "N05",
        "segments-and-offset",
        "the state has segments and an offset",
        reformed(put("nested_offset", value=0.5), _three(), EXPERTS),
    )
    for name, value in (("zero-segments", 0), ("segments-boolean", True)):
        state = reformed(put("segments", value=value), _three(), EXPERTS)
        yield "N05", name, f"segments is {value}", state
    yield (
        "N08",
        "segments",
        "the manifest says 9 segments, the state 3",
        changed(_three(), manifest=put("tensors", EXPERTS, "segments", value=9)),
    )
    silent = changed(_three(), version="1.0", extensions={})
    silent.manifest = remove("tensors", EXPERTS, "segments")
    yield "N08", "segments-untold", "only the state says that there are segments", silent
    yield (
        "N09",
        "rows",
        "4 segments of 18 rows",
        reformed(put("segments", value=4), _three(), EXPERTS),
    )
    yield (
        "N09",
        "two-matrices",
        "a segment of two matrices",
        reformed(put("segments", value=2), stacked([4, 6, 32], 4), EXPERTS),
    )
    yield (
        "N09",
        "two-dimensions",
        "a matrix of two segments",
        reformed(put("segments", value=2), shape=[4, 64], double_quant=False),
    )
    flipped = _three()
    offsets = part(flipped, EXPERTS + nf4.OFFSET)
    offsets.data = bytes([offsets.data[0] ^ 1]) + offsets.data[1:]
    yield "V01", "offset", "an offset is off by an ulp", flipped
    infinite = _three()
    offsets = part(infinite, EXPERTS + nf4.OFFSET)
    offsets.data = offsets.data[:8] + struct.pack("<f", float("inf"))
    yield "V04", "infinite-offset", "the last offset is infinite", repaired(infinite, EXPERTS)
    nested = _three()
    scales = part(nested, EXPERTS + ".nested_absmax")
    scales.data = scales.data[:4] + struct.pack("<f", float("nan")) + scales.data[8:]
    yield "V04", "nan-segment", "a scale of the second segment is NaN", repaired(nested, EXPERTS)
    odd = stacked([2, 5, 13], 2)
    codes = part(odd, EXPERTS)
    codes.data = codes.data[:32] + bytes([codes.data[32] & 0xF0]) + codes.data[33:]
    yield "V05", "first-segment", "the first segment is padded with code 0", repaired(odd, EXPERTS)


def _config_rules() -> Iterator[Case]:
    for name, config in (("segments-bitsandbytes", QUANTIZATION), ("loraformat", OWN)):
        draft = _three() if config is QUANTIZATION else quantized()
        draft.files["config.json"] = text({"quantization_config": config})
        yield "B06", name, "config.json names the other quantizer", draft
