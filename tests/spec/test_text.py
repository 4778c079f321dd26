"""The examples and numbers in the text are true."""

from __future__ import annotations

import re
from hashlib import sha256
from itertools import pairwise

from vectors import INDEX, SPEC, VECTORS

from loraformat.bundle import manifest_rules
from loraformat.nf4 import quant_state
from loraformat.storage import foreign_json, strict_json
from loraformat.tensors import header

TEXT = (SPEC / "loraformat-1.1.md").read_text("utf-8")
SHARD = (VECTORS / "valid" / "nf4-odd-count" / "model-00001-of-00001.safetensors").read_bytes()


def test_hex_dump_is_the_vector() -> None:
    rows = re.findall(r"^([0-9a-f]{8}): ((?:[0-9a-f]{4} ){8})", TEXT, re.MULTILINE)
    assert len(rows) >= 8
    for position, words in rows:
        start = int(position, 16)
        assert bytes.fromhex(words) == SHARD[start : start + 16], position


def test_positions_in_the_hex_dump() -> None:
    positions = dict(re.findall(r"at (1[0-9a-f]{3}): (\.?[\w ]+)", TEXT))
    assert positions == {
        "1037": ".quant_map",
        "1077": ".nested_quant_map",
        "1477": "the quant state",
    }
    assert SHARD[0x1477:].startswith(b'{"quant_type"')
    assert SHARD[0x1477:].decode() in " ".join(TEXT.split())


def test_worked_numbers() -> None:
    (vector,) = (v for v in INDEX["valid"] if v["name"] == "nf4-odd-count")
    (expected,) = vector["dequantized"].values()
    assert expected["float32_first"][0] == "3c8c54c5" and "0x3c8c54c5" in TEXT
    assert 0.0362548828125 + 0.0701904296875 == 0.1064453125


def test_fingerprint_example() -> None:
    line = re.search(r"^ {4}(model\.norm\.weight.*)\\n$", TEXT, re.MULTILINE)
    assert line is not None
    digest = sha256((line[1].replace("\\t", "\t") + "\n").encode()).hexdigest()
    assert digest in TEXT
    (vector,) = (v for v in INDEX["valid"] if v["name"] == "dense-only")
    assert vector["fingerprint"] == digest


def test_bits_per_weight() -> None:
    assert 4 + 8 / 64 + 32 / (64 * 256) == 4.126953125
    assert "4.126953125" in TEXT


def test_limits_are_the_codes() -> None:
    assert f"{header.MAX_HEADER_BYTES:,} bytes" in TEXT
    assert manifest_rules.MAX_MANIFEST_BYTES == 2**26 and "64 MiB" in TEXT
    assert quant_state.MAX_QUANT_STATE_BYTES == 4096
    assert strict_json.MAX_DEPTH == 32 and foreign_json.MAX_DEPTH == 128


def test_rules_stand_in_the_order_of_their_numbers_in_each_section() -> None:
    for section in re.split(r"^## ", TEXT, flags=re.MULTILINE):
        for family in "HLMN":
            ids = re.findall(rf"\*\*\[({family}\d\d)\]\*\*", section)
            assert all(a < b for a, b in pairwise(ids)), ids
