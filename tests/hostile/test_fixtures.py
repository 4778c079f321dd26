"""Hostile bundles by name: each is refused, with the rule, the file, in bounded time and memory."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bundles import (
    INDEX,
    MANIFEST,
    ROOT,
    SHARD,
    VALID,
    join,
    put,
    read,
    refusal,
    repair,
    split,
    write,
)

from loraformat.bundle.reader import open_bundle
from loraformat.errors import FormatError, InputError
from loraformat.nf4.quant_state import parse_quant_state
from loraformat.storage import strict_json
from loraformat.tensors import header

Spoil = Callable[[Path], Any]
_POSIX = pytest.mark.skipif(os.name != "posix", reason="needs links and FIFOs")
NORM = "model.norm.weight"


def _json(path: Path, change: Callable[[Any], Any]) -> None:
    tree = json.loads(path.read_bytes())
    put(path, json.dumps(change(tree) or tree).encode())


def _manifest(change: Callable[[Any], Any]) -> Spoil:
    return lambda path: _json(path / MANIFEST, change)


def _text(file: str, old: bytes, new: bytes) -> Spoil:
    def spoil(path: Path) -> None:
        data = (path / file).read_bytes()
        assert old in data
        put(path / file, data.replace(old, new, 1))

    return spoil


def _header(change: Callable[[Any], Any]) -> Spoil:
    """Change a header, and make the manifest vouch for it."""

    def spoil(path: Path) -> None:
        fields, data = split((path / SHARD).read_bytes())
        files = read(path)
        files[SHARD] = join(change(fields) or fields, data)
        with contextlib.suppress(ValueError, KeyError, TypeError):
            files = repair(files)
        write(path, files)

    return spoil


def _shard(change: Callable[[bytes], bytes]) -> Spoil:
    return lambda path: put(path / SHARD, change((path / SHARD).read_bytes()))


def _replace(file: str, make: Callable[[Path], Any]) -> Spoil:
    def spoil(path: Path) -> None:
        (path / file).unlink()
        make(path / file)

    return spoil


def _linked_outside(file: str) -> Spoil:
    def spoil(path: Path) -> None:
        outside = path.parent / f"outside-{Path(file).name}"
        (path / file).rename(outside)
        (path / file).symlink_to(outside)

    return spoil


def _length(n: int) -> Spoil:
    return _shard(lambda data: n.to_bytes(8, "little") + data[8:])


HOSTILE: dict[str, tuple[str, Spoil]] = {
    "empty shard": ("H01", _shard(lambda data: b"")),
    "header of 100 MB in a small file": ("H01", _length(100_000_000)),
    "header of 2^63 bytes": ("H01", _length(1 << 63)),
    "header of 2^64 - 1 bytes": ("H01", _length((1 << 64) - 1)),
    "polyglot: a zip in front": ("H01", _shard(lambda data: b"PK\x03\x04" + data)),
    "offsets of 2^63": (
        "H06",
        _header(lambda h: h[NORM].update(data_offsets=[1 << 63, (1 << 63) + 16])),
    ),
    "offsets of 2^62": (
        "H08",
        _header(lambda h: h[NORM].update(data_offsets=[1 << 62, (1 << 62) + 16])),
    ),
    "negative offsets": ("H06", _header(lambda h: h[NORM].update(data_offsets=[-16, 0]))),
    "offsets as floats": ("H06", _header(lambda h: h[NORM].update(data_offsets=[39.0, 55.0]))),
    "dimensions whose product wraps": (
        "H07",
        _header(lambda h: h[NORM].update(shape=[1 << 47] * 4)),
    ),
    "overlapping tensors": ("H08", _header(lambda h: h[NORM].update(data_offsets=[0, 16]))),
    "dimension NaN": (
        "H03",
        _shard(lambda d: d.replace(b'"shape":[4]', b'"shape":[NaN]').replace(b"  ", b"", 1)),
    ),
    "tensor called ../../etc/passwd": (
        "H05",
        _header(lambda h: h.update({"../../etc/passwd": h.pop(NORM)})),
    ),
    "tensor named with an escape sequence": (
        "H05",
        _header(lambda h: h.update({"\x1b]0;x\x07": h.pop(NORM)})),
    ),
    "shard named ../": ("M07", _manifest(lambda m: m["shards"][0].update(file="../x.safetensors"))),
    "shard with an absolute name": (
        "M07",
        _manifest(lambda m: m["shards"][0].update(file="/etc/passwd")),
    ),
    "a hundred thousand shards": (
        "M07",
        _manifest(lambda m: m.update(shards=m["shards"] * 100_000)),
    ),
    "index names a shard outside": (
        "B04",
        lambda p: _json(p / INDEX, lambda i: i["weight_map"].update({NORM: "../../x.safetensors"})),
    ),
    "index names an absolute shard": (
        "B04",
        lambda p: _json(p / INDEX, lambda i: i["weight_map"].update({NORM: "/etc/passwd"})),
    ),
    "index nested 100,000 deep": ("B03", lambda p: put(p / INDEX, b'{"weight_map":' * 100_000)),
    "index empty": ("B03", lambda p: put(p / INDEX, b"")),
    "index with a duplicate key": (
        "B03",
        _text(INDEX, b'"weight_map"', b'"weight_map":{},"weight_map"'),
    ),
    "manifest empty": ("M01", lambda p: put(p / MANIFEST, b"")),
    "manifest is an array": ("M02", lambda p: put(p / MANIFEST, b"[]")),
    "manifest in UTF-16": ("M01", lambda p: put(p / MANIFEST, "{}".encode("utf-16"))),
    "manifest with a byte order mark": (
        "M01",
        lambda p: put(p / MANIFEST, b"\xef\xbb\xbf" + (p / MANIFEST).read_bytes()),
    ),
    "manifest nested 100,000 deep": ("M01", lambda p: put(p / MANIFEST, b"[" * 100_000)),
    "manifest of 64 MiB and a byte": ("M01", lambda p: os.truncate(p / MANIFEST, (64 << 20) + 1)),
    "manifest with an unterminated string of quotes": (
        "M01",
        lambda p: put(p / MANIFEST, b"[" * 40 + b'"' + b'\\"' * 2_000_000),
    ),
    "an integer of a million digits": ("M01", _text(MANIFEST, b"2000000000", b"9" * 1_000_000)),
    "version 2.0": ("M03", _manifest(lambda m: m.update(format_version="2.0"))),
    "version 999999.0": ("M03", _manifest(lambda m: m.update(format_version="999999.0"))),
    "version of a million digits": (
        "M03",
        _manifest(lambda m: m.update(format_version="1." + "1" * 10**6)),
    ),
    "an extension that must be understood": (
        "M11",
        _manifest(lambda m: m["extensions"].update(x={})),
    ),
    "carried file ../": (
        "M08",
        _manifest(lambda m: m["files"].update({"../x": m["files"]["config.json"]})),
    ),
    "carried file with an absolute name": (
        "M08",
        _manifest(lambda m: m["files"].update({"/etc/passwd": m["files"]["config.json"]})),
    ),
    "carried file on another drive": (
        "M08",
        _manifest(lambda m: m["files"].update({"C:\\x": m["files"]["config.json"]})),
    ),
    "carried file .git/config": (
        "M08",
        _manifest(lambda m: m["files"].update({".git/config": m["files"]["config.json"]})),
    ),
    "carried file CON": (
        "M08",
        _manifest(lambda m: m["files"].update({"CON.txt": m["files"]["config.json"]})),
    ),
    "adapter named ..": (
        "M09",
        _manifest(lambda m: m["adapters"].update({"..": m["adapters"]["poet"]})),
    ),
    "adapter named a/../..": (
        "M09",
        _manifest(lambda m: m["adapters"].update({"a/../..": m["adapters"]["poet"]})),
    ),
    "carried file of 2^53 - 1 bytes": (
        "B05",
        _manifest(lambda m: m["files"]["config.json"].update(bytes=2**53 - 1)),
    ),
    "a tensor with 2^52 elements": ("N08", _manifest(lambda m: _grow(m))),
    "a directory instead of a file": ("B05", _replace("config.json", Path.mkdir)),
    "a directory instead of a shard": ("---", _replace(SHARD, Path.mkdir)),
    "a directory instead of the manifest": ("B01", _replace(MANIFEST, Path.mkdir)),
    "a second model beside it": ("B02", lambda p: put(p / "model.safetensors", b"")),
    "an adapter cut short": ("V03", lambda p: _cut(p, "adapters/poet/adapter_model.safetensors")),
}
LINKS: dict[str, tuple[str, Spoil]] = {
    "a FIFO instead of a shard": ("---", _replace(SHARD, lambda p: os.mkfifo(p))),
    "a FIFO instead of a carried file": ("B05", _replace("config.json", lambda p: os.mkfifo(p))),
    "a FIFO instead of the manifest": ("B01", _replace(MANIFEST, lambda p: os.mkfifo(p))),
    "a link out of the directory for a shard": ("---", _linked_outside(SHARD)),
    "a link out of the directory for the manifest": ("---", _linked_outside(MANIFEST)),
    "a link out of the directory for the config": ("B06", _linked_outside("config.json")),
    "a link out of the directory for an adapter": (
        "---",
        _linked_outside("adapters/poet/adapter_config.json"),
    ),
    "a link to itself for a shard": ("---", _replace(SHARD, lambda p: p.symlink_to(p.name))),
    "a link to /dev/zero for a shard": (
        "---",
        _replace(SHARD, lambda p: p.symlink_to("/dev/zero")),
    ),
    "a dangling link for the index": ("B03", _replace(INDEX, lambda p: p.symlink_to("nowhere"))),
}


def _grow(manifest: Any) -> None:
    import minireader

    manifest["tensors"][NORM]["shape"] = [1 << 52]
    manifest["fingerprint"] = minireader.fingerprint(manifest["tensors"])


def _cut(path: Path, file: str) -> None:
    data = bytearray((path / file).read_bytes())
    data[-1] ^= 1
    put(path / file, data)


def _refused(path: Path, spoil: Spoil) -> str:
    write(path, read(VALID / "adapter"))
    spoil(path)
    started = time.perf_counter()
    reason = refusal(path)
    assert time.perf_counter() - started < 5
    assert reason is not None, "accepted"
    return reason


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_bundle_is_refused(name: str, tmp_path: Path) -> None:
    rule, spoil = HOSTILE[name]
    reason = _refused(tmp_path / "bundle", spoil)
    assert reason[:3] == rule, reason
    assert str(tmp_path) in reason, "the message names the file"
    assert reason.isprintable(), "the message cannot disturb a terminal"


@_POSIX
@pytest.mark.parametrize("name", LINKS)
def test_hostile_directory_is_refused(name: str, tmp_path: Path) -> None:
    rule, spoil = LINKS[name]
    reason = _refused(tmp_path / "bundle", spoil)
    assert reason[:3] == rule, reason
    assert str(tmp_path) in reason


def test_messages_name_tensor_and_byte(tmp_path: Path) -> None:
    def said(spoil: Spoil, place: str) -> str:
        return _refused(tmp_path / place, spoil)

    assert "shares" not in (overlap := said(HOSTILE["overlapping tensors"][1], "a"))
    assert NORM in overlap or "up_proj" in overlap
    assert "data byte" in overlap
    assert "100000000" in said(HOSTILE["header of 100 MB in a small file"][1], "b")


@pytest.mark.parametrize("kind", ["dense-only", "adapter"])
def test_truncated_at_every_byte(kind: str, tmp_path: Path) -> None:
    path = write(tmp_path / "bundle", read(VALID / kind))
    for file, data in read(path).items():
        # The header of a shard ends in thousands of equal spaces: every 16th will do there.
        padding = range(data.find(b"  "), 4096) if file.endswith(".safetensors") else range(0)
        white = len(data) - len(data.rstrip()) if file in (MANIFEST, INDEX) else 0
        for length in range(len(data) - white):
            if length in padding and length % 16:
                continue
            os.truncate(path / file, length)
            assert refusal(path) is not None, (file, length)
            put(path / file, data)


def test_nothing_is_allocated_before_the_check(tmp_path: Path) -> None:
    for number, name in enumerate(
        [
            "header of 100 MB in a small file",
            "header of 2^63 bytes",
            "dimensions whose product wraps",
            "carried file of 2^53 - 1 bytes",
            "manifest of 64 MiB and a byte",
            "a tensor with 2^52 elements",
        ]
    ):
        path = write(tmp_path / str(number), read(VALID / "adapter"))
        HOSTILE[name][1](path)
        tracemalloc.start()
        try:
            assert refusal(path) is not None
            assert tracemalloc.get_traced_memory()[1] < 2_000_000, name
        finally:
            tracemalloc.stop()


@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_AS as Linux counts it")
def test_huge_sparse_shard_within_a_small_address_space(tmp_path: Path) -> None:
    """A file of 100 MB that announces a header of as much is read once, and refused."""
    path = write(tmp_path / "bundle", read(VALID / "dense-only"))
    put(path / SHARD, (99_999_992).to_bytes(8, "little") + b"{")
    os.truncate(path / SHARD, 100_000_000)
    program = (
        "import numpy, resource, sys; from pathlib import Path\n"
        "from loraformat.bundle.integrity import verify_bundle\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 450_000_000,) * 2)\n"
        "print(verify_bundle(Path(sys.argv[1]))[0].rule)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.stdout.strip() == "H02", done.stderr


def test_not_a_directory(tmp_path: Path) -> None:
    for path in (tmp_path / "missing", tmp_path / "file"):
        if path.name == "file":
            path.write_bytes(b"")
        with pytest.raises(InputError, match=path.name):
            open_bundle(path)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b" ",
        b"nul",
        b"{",
        b'{"a":1}x',
        b"NaN",
        b"[Infinity]",
        b"-Infinity",
        b"1e999",
        b"9" * 21,
        b"01",
        b"+1",
        b".5",
        b"'a'",
        b'{"a":1,"a":1}',
        b'{"a":{"b":1,"b":2}}',
        b'"\\ud800"',
        b'"\xff"',
        b'"\x00"',
        b"\xef\xbb\xbf{}",
        b"[" * 33 + b"]" * 33,
        b'[{"a":' * 17,
        b"[" * 10**6,
        b"{}//",
        b"[1,]",
    ],
)
def test_strict_json_refuses(text: bytes) -> None:
    with pytest.raises(strict_json.StrictJsonError):
        strict_json.loads(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (b'"[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[["', "[" * 38),
        (b'["\\"' + b"[" * 40 + b'\\\\"]', ['"' + "[" * 40 + "\\"]),
        (b"[" * 32 + b"]" * 32, None),
        (b"1e308", 1e308),
        (b"-0", 0),
        (b'"\\ud83d\\udc0d"', "\U0001f40d"),
    ],
)
def test_strict_json_accepts(text: bytes, value: Any) -> None:
    loaded = strict_json.loads(text)
    assert value is None or loaded == value


def test_depth_check_is_linear() -> None:
    started = time.perf_counter()
    for text in (b"[" * 40 + b'"' + b'\\"' * 10**7, b"[" * 10**7, b'["' * 5 * 10**6):
        with pytest.raises(strict_json.StrictJsonError):
            strict_json.loads(text)
    assert time.perf_counter() - started < 10


def test_many_tensors_in_bounded_time() -> None:
    fields = {
        f"t{i}": {"dtype": "U8", "shape": [1], "data_offsets": [i, i + 1]} for i in range(50_000)
    }
    raw = json.dumps(fields).encode()
    started = time.perf_counter()
    parsed = header.parse_header(raw, 8 + len(raw) + 50_000, "x.safetensors")
    assert len(parsed.entries) == 50_000
    assert time.perf_counter() - started < 10


@pytest.mark.parametrize("size", [0, 4097])
def test_quant_state_of_a_wrong_size(size: int) -> None:
    with pytest.raises(FormatError) as caught:
        parse_quant_state(b" " * size, "w", "x.safetensors")
    assert caught.value.rule == "N05"
