"""Invalid vectors of the safetensors header, rules H01 to H10."""

from __future__ import annotations

from collections.abc import Iterator

from vector_bundle import (
    NORM,
    Draft,
)
from vector_drafts import changed, dense, floats, moved, named, put, swap, twice


def header_rules() -> Iterator[tuple[str, str, str, Draft]]:
    """Yield rule, name, how it is made, and the draft, of H01 to H10."""
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
