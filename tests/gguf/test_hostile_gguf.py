"""Hostile GGUF files end in an error of ours that names the file: soon, and in little memory."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from random import Random

import gguf
import pytest
from hostile_gguf import HANGS_GGUF, HOSTILE
from loraformat_converters.gguf.container.reader import open_gguf
from loraformat_converters.gguf.quantization.blocks import dequantize
from raw_gguf import (
    ARCHITECTURE,
    ARRAY,
    F32,
    STRING,
    U16,
    Key,
    Raw,
    Tensor,
    build,
    small_base,
    small_lora,
)

from loraformat.errors import InputError, LoraFormatError
from loraformat.ops.convert.convert import convert
from tests.peak_memory import PeakGrowth

CASES = int(os.environ.get("LORAFORMAT_FUZZ_CASES", "20000"))
SEED = int(os.environ.get("LORAFORMAT_FUZZ_SEED", "1"))
MEBIBYTE = 1 << 20


@pytest.mark.parametrize("name", HOSTILE)
def test_a_named_file_is_refused(name, tmp_path):
    make, problem = HOSTILE[name]
    path = tmp_path / "hostile.gguf"
    path.write_bytes(make())
    with pytest.raises(InputError) as error:
        open_gguf(path)
    assert problem in str(error.value) and str(error.value).startswith(f"{path}: ")
    assert str(error.value).isprintable() and len(str(error.value)) < 700
    assert error.value.exit_code == 3


@pytest.mark.parametrize("name", HOSTILE)
def test_no_conversion_begins(name, tmp_path):
    path = tmp_path / "hostile.gguf"
    path.write_bytes(HOSTILE[name][0]())
    with pytest.raises(InputError) as error:
        convert(path, tmp_path / "out")
    assert error.value.exit_code == 3
    assert [path.name for path in tmp_path.iterdir()] == ["hostile.gguf"]


@pytest.mark.parametrize("verb", [["info"], ["verify"], ["convert"]])
def test_the_command_line_says_so(command, tmp_path, verb):
    path = tmp_path / "hostile.gguf"
    path.write_bytes(HANGS_GGUF)
    done = command(*verb, path, *([tmp_path / "out"] if verb == ["convert"] else []))
    assert done.returncode == 3 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and done.stderr.startswith(f"error: {path}: ")
    assert not (tmp_path / "out").exists()


def test_the_file_that_hangs_gguf_is_small():
    assert len(HANGS_GGUF) == 56


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda path: None, "no such file|No such file"),
        (lambda path: path.mkdir(), "not a regular file|Is a directory"),
        (lambda path: os.mkfifo(path), "not a regular file"),
        (lambda path: path.symlink_to("/etc/passwd"), "leads out of its directory"),
        (lambda path: path.symlink_to(path), "cannot be opened"),
    ],
)
def test_what_is_no_file(make, problem, tmp_path):
    path = tmp_path / "x.gguf"
    make(path)
    with pytest.raises(InputError, match=problem):
        open_gguf(path)


def test_names_that_look_like_paths_are_names(tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(build([ARCHITECTURE], [Tensor("../../../etc/passwd", [8], nbytes=32)]).data)
    with open_gguf(path) as file:
        assert list(file.tensors) == ["../../../etc/passwd"]


def test_vocabularies_that_are_not_utf8_are_refused_when_they_are_read(tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(build([Key("tokens", ARRAY, [b"a", b"\xff"], STRING)]).data)
    with open_gguf(path) as file:
        assert list(file.metadata) == ["tokens"]
        with pytest.raises(InputError, match=r"a\.gguf: key tokens holds text that is not UTF-8"):
            file.array("tokens")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_scale_that_is_no_number_is_refused_when_it_is_read(tmp_path, value):
    path = tmp_path / "a.gguf"
    path.write_bytes(build([Key("adapter.lora.alpha", F32, value)]).data)
    with open_gguf(path) as file, pytest.raises(InputError, match="wanted a finite number"):
        file.number("adapter.lora.alpha")


def test_parts_are_bounded_together(tmp_path):
    for number in range(3):
        keys = [Key("split.no", U16, number), Key("split.count", U16, 3)]
        tensors = [Tensor(f"{number}.{n}", [8], nbytes=32) for n in range(12_000)]
        path = tmp_path / f"m-{number + 1:05}-of-00003.gguf"
        path.write_bytes(build(keys, tensors).data)
    with pytest.raises(InputError, match=r"m-00003-of-00003\.gguf: and the parts before it have"):
        open_gguf(path)


# --- Time and memory --------------------------------------------------------------------------


def _write_giants(folder: Path) -> list[Path]:
    """Files at the limits, sound or not: the most work and memory that one can ask for."""
    giants = {
        "strings": build([Key("x", ARRAY, raw=struct.pack("<IQ", STRING, 2**21) + bytes(2**24))]),
        "keys": build([Key(f"{n:05}", STRING, "") for n in range(2**15)]),
        "tensors": build([], [Tensor(f"{n:05}", [8], nbytes=32) for n in range(2**15)]),
        "emoji": build([Key("x", STRING, "x" + "🦙" * (2**24 - 1))]),
        "many texts": build([Key(f"{n}", STRING, "é" * 2**22) for n in range(15)]),
        "head": build([Key(f"{n}", STRING, "x" * 2**25) for n in range(4)]),
        "cut strings": Raw(bytearray(build([
            Key("x", ARRAY, raw=struct.pack("<IQ", STRING, 2**21) + bytes(2**24 - 4))
        ]).data[:-32])),
    }  # fmt: skip
    paths = []
    for name, raw in giants.items():
        paths.append(folder / f"{name}.gguf")
        paths[-1].write_bytes(raw.data)
    for name, (make, _) in HOSTILE.items():
        paths.append(folder / f"{len(paths)}.gguf")
        paths[-1].write_bytes(make())
        if name.startswith(("2^", "offset", "text", "array", "product", "an exabyte")):
            with paths[-1].open("r+b") as file:  # and a file so long that the claim is possible
                file.truncate(1 << 42)
    return paths


_OPEN_ALL = """
import json, sys, time
from pathlib import Path
from loraformat.errors import InputError
from loraformat_converters.gguf.container.reader import open_gguf

slowest = 0.0
for path in sys.argv[1:]:
    began = time.process_time()
    try:
        open_gguf(Path(path)).close()
    except InputError:
        pass
    slowest = max(slowest, time.process_time() - began)
# Not ru_maxrss, which a process inherits from the one that started it.
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
peak = int(status["VmHWM"].split()[0]) * 1024
print(json.dumps([slowest, peak, sorted({"torch", "gguf"} & set(sys.modules))]))
"""


def test_time_and_memory_are_bounded(tmp_path):
    paths = _write_giants(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", _OPEN_ALL, *map(str, paths)],
        stdout=subprocess.PIPE, check=True, text=True,
    )  # fmt: skip
    seconds, peak, imported = json.loads(done.stdout)
    print(f"slowest {seconds:.2f} s, peak {peak / MEBIBYTE:.0f} MiB")
    assert peak < 300 * MEBIBYTE
    assert seconds < 2  # of processor time; half a second where nothing else runs
    assert imported == []


# --- Mutations --------------------------------------------------------------------------------

_INTERESTING = [0, 1, 2, 3, 7, 8, 9, 13, 31, 32, 33, 63, 64, 255, 2**16, 2**21, 2**31, 2**32 - 1,
                2**32, 2**40, 2**48, 2**61, 2**63 - 1, 2**63, 2**64 - 32, 2**64 - 1]  # fmt: skip


def mutate(original: Raw, rng: Random) -> tuple[str, bytes]:
    """Return a description and a damaged file."""
    data, what = bytearray(original.data), []
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        kind = rng.choice(["number", "number", "number", "flip", "byte", "cut", "insert", "delete",
                           "copy", "append"])  # fmt: skip
        at, other = rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)
        length = rng.choice([1, 2, 4, 8, 8, 16, 32, 64, 1000])
        if kind == "number":
            at, size = rng.choice(original.numbers)
            value = rng.choice([*_INTERESTING, rng.getrandbits(8 * size)])
            if rng.random() < 0.4 and at + size <= len(data):
                value = int.from_bytes(data[at : at + size], "little") + rng.choice([-1, 1, 32])
            data[at : at + size] = (value % 2 ** (8 * size)).to_bytes(size, "little")
        elif kind == "flip" and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == "byte" and at < len(data):
            data[at] = rng.choice(b"\x00\xff\x80\x7f\x01\x20")
        elif kind == "cut":
            del data[at:]
        elif kind == "insert":
            data[at:at] = rng.randbytes(length)
        elif kind == "delete":
            del data[at : at + length]
        elif kind == "copy":
            data[at : at + length] = data[other : other + length]
        elif kind == "append":
            data += bytes(length)
        what.append(f"{kind} {at} {other} {length}")
    return "; ".join(what), bytes(data)


def write_anew(path: Path, data: bytes) -> None:
    """Write a file where one was. Some file systems send one that is cut to the disk at once."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)


def look_at_everything(path: Path) -> dict[str, tuple[int, int]]:
    """Open a file and read all that it holds; return where its tensors lie."""
    with open_gguf(path) as file:
        for key, value in file.metadata.items():
            for getter in (file.text, file.integer, file.number, file.flag, file.array):
                try:
                    getter(key)
                except InputError as error:
                    assert str(path) in str(error)
            assert len(value.described) < 60
        for tensor in file.tensors.values():
            dequantize(file.load(tensor.name), tensor.type, tensor.shape)
        return {t.name: (t.offset, t.nbytes) for t in file.tensors.values()}


def test_mutations_are_refused_or_read_as_gguf_reads_them(tmp_path):
    rng, path = Random(SEED), tmp_path / "mutated.gguf"
    originals = [small_base(), small_lora()]
    for original in originals:  # and what is imported on first use is
        path.write_bytes(original.data)
        look_at_everything(path)
    outcomes: Counter[str] = Counter()
    growth = PeakGrowth()
    for number in range(CASES):
        what, data = mutate(originals[number % 2], rng)
        case = f"seed {SEED}, case {number}: {what}"
        write_anew(path, data)
        places, began = None, time.process_time()
        try:
            places = look_at_everything(path)
        except LoraFormatError as error:
            assert str(error).startswith(f"{path}: ") or "tensor" in str(error), case
            outcomes[str(error).removeprefix(f"{path}: ")[:12]] += 1
        except Exception as error:
            raise AssertionError(f"{case}: {error!r}") from error
        assert time.process_time() - began < 1, case
        if places is not None:
            outcomes["accepted"] += 1
            if outcomes["accepted"] % 4 == 0:
                reader = gguf.GGUFReader(path)
                peer = {t.name: (int(t.data_offset), int(t.n_bytes)) for t in reader.tensors}
                assert places == peer, case
                del reader
    assert growth.nbytes < 200 * MEBIBYTE, f"{growth.nbytes / MEBIBYTE:.0f} MiB"
    assert 0.02 * CASES < outcomes["accepted"] < 0.4 * CASES, outcomes
    assert len(outcomes) > 25, outcomes


@pytest.mark.parametrize("make", [small_base, small_lora])
def test_every_length_is_refused(make, tmp_path):
    """A file cut anywhere but in its last padding is refused."""
    path, data = tmp_path / "cut.gguf", bytes(make().data)
    path.write_bytes(data)
    end = max(offset + nbytes for offset, nbytes in look_at_everything(path).values())
    for length in range(len(data)):
        write_anew(path, data[:length])
        if length < end:
            with pytest.raises(InputError, match=r"bytes|byte|can hold"):
                open_gguf(path)
        else:
            look_at_everything(path)


def test_cases_are_repeatable():
    one, other = Random("x"), Random("x")
    assert [mutate(small_base(), one) for _ in range(50)] == [
        mutate(small_base(), other) for _ in range(50)
    ]
