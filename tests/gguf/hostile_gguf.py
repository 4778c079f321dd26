"""Named hostile GGUF files: how each is made, and what must be said of it.

The first of each group is what made some program hang, crash, read beyond a buffer, or
believe it; the others are its relatives.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from raw_gguf import (
    ARCHITECTURE,
    ARRAY,
    BOOL,
    F32,
    I32,
    STRING,
    U8,
    U16,
    U32,
    U64,
    Key,
    Tensor,
    build,
    small_base,
    small_lora,
)

__all__ = ["HOSTILE"]


def _keys(*keys: Key, **options) -> Callable[[], bytes]:
    return lambda: bytes(build([ARCHITECTURE, *keys], **options).data)


def _tensors(*tensors: Tensor, **options) -> Callable[[], bytes]:
    return lambda: bytes(build([ARCHITECTURE], tensors, **options).data)


def _array(item: int, count: int, value: object = ()) -> Callable[[], bytes]:
    return _keys(Key("x", ARRAY, value, item, count))


def _cut(length: int) -> Callable[[], bytes]:
    return lambda: bytes(small_base().data[:length])


def _nested(depth: int) -> Callable[[], bytes]:
    # Each floor: item type "array", one item, which begins with its own item type.
    return _keys(Key("x", ARRAY, raw=struct.pack("<IQ", ARRAY, 1) * depth))


def _vector(name: str = "a", **options) -> Tensor:
    return Tensor(name, [8], **{"nbytes": 32, **options})


HANGS_GGUF = struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + struct.pack(
    "<Q8sIIQ", 8, b"x.y.zzzz", ARRAY, U32, 2**40
)

#: Name: how to make it, and part of the message. "(GHSA)" marks the cause of an advisory.
HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    # --- what it is
    "empty": (lambda: b"", "is 0 bytes long"),
    "magic only": (lambda: b"GGUF", "is 4 bytes long"),
    "zip": (lambda: b"PK\x03\x04" + bytes(60), "begins with b'PK"),
    "ggjt": (lambda: b"tjgg" + bytes(60), "is a ggjt file, an ancestor of GGUF"),
    "version 0": (lambda: bytes(build(version=0).data), "of GGUF version 0, wanted 2 or 3"),
    "version 1": (lambda: bytes(build(version=1).data), "of GGUF version 1, wanted 2 or 3"),
    "version 4": (lambda: bytes(build(version=4).data), "of GGUF version 4, wanted 2 or 3"),
    "big-endian": (lambda: bytes(build(order=">").data), "is a big-endian GGUF file"),
    "big-endian version 2": (lambda: bytes(build(version=2, order=">").data), "is a big-endian"),
    # --- counts that are allocated before they are believed (CVE-2024-21802 and its class)
    "2^40 items in 56 bytes": (lambda: HANGS_GGUF, "claims 1099511627776 items"),  # hangs gguf-py
    "2^64-1 keys": (_keys(key_count=2**64 - 1), "claims 18446744073709551615 keys"),
    "2^64-1 tensors": (_keys(tensor_count=2**64 - 1), "claims 18446744073709551615 tensors"),
    "2^32 keys": (_keys(key_count=2**32), "claims 4294967296 keys"),
    "more keys than bytes": (_keys(key_count=30_000), "more than its 96 bytes can hold"),
    "more tensors than bytes": (_keys(tensor_count=30_000), "more than its 96 bytes can hold"),
    "one key too many": (_keys(key_count=2), "has a name of 0 bytes"),
    "one tensor too many": (_keys(tensor_count=1), "has a name of 0 bytes"),
    "array count times size is 2^64": (_array(U64, 2**61), "claims 2305843009213693952 items"),
    "array longer than the file": (_array(U8, 1000), "more than the rest of the file can hold"),
    "array longer than the limit": (
        _keys(Key("x", ARRAY, raw=struct.pack("<IQ", U8, 2**21 + 1)), tail=bytes(2**21 + 64)),
        "claims 2097153 items, more than 2097152",
    ),
    "string array longer than the file": (_array(STRING, 1000), "the rest of the file can hold"),
    "strings of two arrays beyond the limit": (
        lambda: bytes(
            build(
                [
                    Key(
                        "x",
                        ARRAY,
                        raw=struct.pack("<IQ", STRING, 2**20 + 1) + bytes(8 * (2**20 + 1)),
                    ),
                    Key("y", ARRAY, raw=struct.pack("<IQ", STRING, 2**20) + bytes(8 * 2**20)),
                ]
            ).data
        ),
        "has more than 2097152 strings in its arrays",
    ),
    "key of 2^64-1 bytes": (
        lambda: bytes(build([], key_count=1).data[:24]) + b"\xff" * 8 + bytes(64),
        "has a name of 18446744073709551615 bytes",
    ),
    "text of 2^63 bytes": (
        _keys(Key("x", STRING, raw=struct.pack("<Q", 2**63))),
        "claims 9223372036854775808 bytes",
    ),
    "text beyond the end": (
        _keys(Key("x", STRING, raw=struct.pack("<Q", 500))),
        "inside the value of x",
    ),
    "string in an array beyond the end": (
        _keys(Key("x", ARRAY, raw=struct.pack("<IQQ", STRING, 1, 2**62))),
        "inside the value of x",
    ),
    # --- types
    "value type 13": (_keys(Key("x", 13, raw=bytes(8))), "is of type 13, and GGUF has 0 to 12"),
    "value type 2^32-1": (_keys(Key("x", 2**32 - 1, raw=b"")), "is of type 4294967295"),
    "item type 13": (_keys(Key("x", ARRAY, raw=struct.pack("<IQ", 13, 0))), "is of type 13"),
    "array of arrays": (_nested(2), "is an array of arrays"),
    "arrays a thousand deep": (_nested(1000), "is an array of arrays"),  # RecursionError in gguf-py
    "truth value 7": (_keys(Key("x", BOOL, b"\7")), "is the truth value 7"),
    "truth values in an array": (
        _keys(Key("x", ARRAY, [b"\1", b"\2"], BOOL)),
        "is the truth value 2",
    ),
    # --- names and texts
    "the same key twice": (_keys(ARCHITECTURE), "has the key general.architecture twice"),
    "empty key": (_keys(Key("", U32, 1)), "key 1 has a name of 0 bytes"),  # aborts llama.cpp
    "key of 1025 bytes": (_keys(Key("k" * 1025, U32, 1)), "has a name of 1025 bytes"),
    "key that is not UTF-8": (_keys(Key(b"\xff\xfe", U32, 1)), "a name that is not UTF-8"),
    "key with a terminal's escape": (_keys(Key("a\x1b[31m", U32, 1)), "control characters"),
    "key with NUL": (_keys(Key("general.architecture\0", U32, 1)), "control characters"),
    "text that is not UTF-8": (_keys(Key("x", STRING, b"a\xff")), "the value of x is not UTF-8"),
    "text that ends inside a character": (_keys(Key("x", STRING, b"a\xe2\x82")), "is not UTF-8"),
    "text with a surrogate": (_keys(Key("x", STRING, b"\xed\xa0\x80")), "is not UTF-8"),
    "the same tensor twice": (
        _tensors(_vector(), _vector(), data=bytes(64)),
        "has the tensor a twice",
    ),
    "empty tensor name": (_tensors(_vector("")), "tensor 0 has a name of 0 bytes"),
    "tensor name of 64 bytes": (_tensors(_vector("n" * 64)), "has a name of 64 bytes"),
    "tensor name with NUL": (_tensors(_vector("a\0b")), "control characters"),
    # --- alignment (division by zero in Ollama, candle, gguf-tools)
    "alignment 0": (_keys(Key("general.alignment", U32, 0)), "general.alignment is 0"),
    "alignment 1": (_keys(Key("general.alignment", U32, 1)), "general.alignment is 1"),
    "alignment 48": (_keys(Key("general.alignment", U32, 48)), "general.alignment is 48"),
    "alignment 2^31": (_keys(Key("general.alignment", U32, 2**31)), "is 2147483648"),
    "alignment of 64 bits": (_keys(Key("general.alignment", U64, 32)), "is a UINT64, wanted"),
    "alignment as text": (_keys(Key("general.alignment", STRING, "32")), "is a STRING, wanted"),
    "alignment as array": (_keys(Key("general.alignment", ARRAY, [32], U32)), "is a ARRAY"),
    # --- shapes (CVE-2026-33298: sizes multiplied beyond 64 bits)
    "no dimensions": (_tensors(Tensor("a", [])), "tensor a has 0 dimensions, wanted 1 to 4"),
    "five dimensions": (_tensors(Tensor("a", [1] * 5)), "tensor a has 5 dimensions"),
    "2^32-1 dimensions": (_tensors(Tensor("a", [1], dimensions=2**32 - 1)), "dimensions"),
    "size 0": (_tensors(Tensor("a", [8, 0])), "wanted sizes from 1 to 2^48 - 1"),
    "size 2^63": (_tensors(Tensor("a", [2**63])), "wanted sizes from 1 to 2^48 - 1"),
    "size 2^64-1": (_tensors(Tensor("a", [2**64 - 1])), "wanted sizes from 1 to 2^48 - 1"),
    "product 2^64": (_tensors(Tensor("a", [2**32, 2**32])), "tensor a ends at byte"),
    "product 2^64 + 8": (
        _tensors(Tensor("a", [8, 2**47 - 1, 2**47 - 1, 2**47 - 1])),
        "tensor a ends at byte",
    ),
    "an exabyte": (_tensors(Tensor("a", [2**40, 2**20])), "tensor a ends at byte"),
    "row that does not fill its blocks": (
        _tensors(Tensor("a", [33, 2], 8, nbytes=96)),
        "Q8_0 wants a multiple of 32",
    ),
    "tensor type 99": (_tensors(_vector(kind=99)), "tensor a is of the unknown type 99"),
    "tensor type 2^32-1": (_tensors(_vector(kind=2**32 - 1)), "of the unknown type 4294967295"),
    "a type that ggml removed": (_tensors(_vector(kind=4)), "of type Q4_2, which ggml has removed"),
    # --- places (CVE-2026-7482: offset and size beyond the end, read nevertheless)
    "offset beyond the end": (_tensors(_vector(offset=2**40)), "leaving a gap; wanted 0"),
    "offset near 2^64": (_tensors(_vector(offset=2**64 - 32)), "leaving a gap; wanted 0"),
    "offset that is not aligned": (_tensors(_vector(offset=4)), "which is not a multiple of 32"),
    "overlapping tensors": (
        _tensors(_vector("a"), _vector("b", offset=0)),
        "b begins at offset 0, inside the tensor",
    ),
    "partly overlapping tensors": (
        _tensors(Tensor("a", [16], nbytes=64), _vector("b", offset=32)),
        "inside the tensor before",
    ),
    "gap between tensors": (
        _tensors(_vector("a"), _vector("b", offset=64), data=bytes(96)),
        "leaving a gap; wanted 32",
    ),
    "tensors in another order": (
        _tensors(_vector("a", offset=32), _vector("b", offset=0)),
        "leaving a gap; wanted 0",
    ),
    "last byte missing": (_tensors(_vector(), data=bytes(31)), "tensor a ends at byte"),
    "no data": (_tensors(_vector(), data=b""), "tensor a ends at byte"),
    "a byte too many": (_tensors(_vector(), tail=b"x"), "has 1 bytes after its last tensor"),
    "another file behind it": (
        lambda: bytes(small_lora().data + small_base().data),
        "bytes after its last tensor",
    ),
    "a megabyte behind a file without tensors": (_keys(tail=bytes(2**20)), "has 1048576 bytes"),
    # --- cut off
    "cut in the counts": (_cut(23), "is 23 bytes long"),
    "cut in a key": (_cut(40), "40 bytes"),
    "cut in the tensors": (_cut(900), "900"),
    # --- split into parts
    "split into 65535 parts": (_keys(Key("split.count", U16, 65535)), "split into 65535 parts"),
    "split into 3 parts, its name unknown": (
        _keys(Key("split.count", U16, 3)),
        "its name does not say which",
    ),
    "parts counted with a text": (
        _keys(Key("split.count", STRING, "3")),
        "split.count is a STRING",
    ),
    "parts counted with an array": (
        _keys(Key("split.count", ARRAY, [1, 2], I32)),
        "split.count is an array of 2 INT32",
    ),
    "parts counted with a fraction": (_keys(Key("split.count", F32, 2.0)), "wanted an integer"),
}
