"""The valid vectors: one bundle for each thing that the format can express."""

from __future__ import annotations

from collections.abc import Iterator

import vector_nf4 as nf4
from vector_bundle import (
    UP,
    Draft,
)
from vector_drafts import (
    SIZES,
    dense,
    floats,
    layers,
    negative,
    newer_minor,
    overflow,
    quantized,
    stacked,
    with_adapter,
)


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
    odd = dense()
    odd.files["config.json"] = (
        b'{"limits": [0.0, Infinity, -Infinity, NaN], "n": 1, "n": ' + b"9" * 40 + b"}\n"
    )
    yield "carried-json", "config.json as only the programs that own it read it", odd
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
        "segments",
        "3 experts of 6 x 32: a block of 64 would cross from one into the next",
        stacked([3, 6, 32], 3),
    )
    yield (
        "segments-odd",
        "2 experts of 5 x 13, so that each ends with a code and the padding 7",
        stacked([2, 5, 13], 2),
    )
    yield (
        "segments-plain",
        "without double quantization",
        stacked([3, 6, 32], 3, double_quant=False),
    )
    yield (
        "segments-two-halves",
        "2 experts of 4 x 40, the upper and lower half of each a segment of its own",
        stacked([2, 4, 40], 4),
    )
    yield (
        "segments-nested-tail",
        "2 experts of 257 blocks, so that the second level has a tail in each",
        stacked([2, 257, 32], 2, block_size=32),
    )
    yield "segments-one", "one expert is one segment", stacked([1, 3, 40], 1, dtype="F16")
    yield "segments-four-dimensions", "a stack of stacks", stacked([2, 2, 3, 32], 4)
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
