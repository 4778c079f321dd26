"""Invalid vectors of the manifest, rules M01 to M12."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import sha256

from vector_bundle import (
    INDEX,
    NORM,
    UP,
    Draft,
    record,
)
from vector_drafts import (
    ONE_SHARD,
    TOKENIZER,
    changed,
    dense,
    index_of,
    nested,
    put,
    quantized,
    remove,
    swap,
    with_adapter,
)


def manifest_rules() -> Iterator[tuple[str, str, str, Draft]]:
    """Yield rule, name, how it is made, and the draft, of M01 to M12."""
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
