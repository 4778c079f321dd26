"""What an upload through Xet stored: the hash under which each SHA-256 can be fetched again.

The client puts shards into its local store: a header of 48 bytes, then for each file a record
of 48 bytes (hash, flags, count), as many segments, as many verifications, and the SHA-256.
Hashes are four little-endian words, shown as hexadecimal numbers.
"""

import struct
from pathlib import Path

RECORD = 48
VERIFIED, WITH_SHA256 = 1 << 31, 1 << 30


def hashes(store):
    """Return Xet hashes by SHA-256, both in hexadecimal."""
    found = {}
    for path in Path(store).rglob("shards/*.mdb"):
        found |= _files(path.read_bytes())
    return found


def _files(data):
    found, position = {}, RECORD
    while (head := data[position : position + RECORD])[:32] != b"\xff" * 32:
        flags, count = struct.unpack_from("<II", head, 32)
        position += RECORD * (1 + count * (2 if flags & VERIFIED else 1))
        if flags & WITH_SHA256:
            found[_hex(data[position:])] = _hex(head)
            position += RECORD
    return found


def _hex(data):
    return "".join(f"{word:016x}" for word in struct.unpack_from("<4Q", data))
