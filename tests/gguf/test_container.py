"""Reading what gguf-py writes: metadata, tensors, split files, and the safety of the mapping."""

from __future__ import annotations

import os
from pathlib import Path

import gguf
import numpy as np
import pytest
from loraformat_converters.gguf.container.reader import is_gguf, open_gguf
from loraformat_converters.gguf.container.types import GGMLType, ValueType
from loraformat_converters.gguf.quantization.blocks import (
    DEQUANTIZABLE,
    dequantize,
    quantize,
    storable_type,
)

from loraformat.errors import FileChangedError, InputError, UnsupportedError

RNG = np.random.default_rng(1)


def write(path: Path, *, tensors: dict[str, np.ndarray] | None = None, **options) -> Path:
    writer = gguf.GGUFWriter(path, "llama", **options)
    writer.add_uint32("llama.block_count", 3)
    writer.add_uint64("wide", 2**63)
    writer.add_int8("small", -5)
    writer.add_float32("llama.epsilon", 1e-5)
    writer.add_float64("nan", float("nan"))
    writer.add_bool("flag", True)
    writer.add_string("general.name", "é\n")
    writer.add_array("tokens", ["a", "", "<é>"])
    writer.add_array("scores", [1.5, -2.0])
    for name, data in (tensors or {"a.weight": RNG.random((3, 4), np.float32)}).items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_metadata(tmp_path):
    with open_gguf(write(tmp_path / "a.gguf")) as file:
        assert file.version == 3 and file.architecture == "llama"
        assert file.integer("{arch}.block_count") == 3
        assert file.integer("wide") == 2**63 and file.integer("small") == -5
        assert file.number("{arch}.epsilon") == np.float32(1e-5)
        assert file.number("{arch}.block_count") == 3.0
        assert file.flag("flag") is True and file.text("general.name") == "é\n"
        assert file.array("tokens") == ["a", "", "<é>"]
        assert file.array("scores", ValueType.FLOAT32, ValueType.FLOAT64) == [1.5, -2.0]
        assert file.metadata["flag"].type is ValueType.BOOL
        assert (file.integer("none", 4), file.text("none", "x"), file.flag("none", False)) == (
            4, "x", False
        )  # fmt: skip
    assert file.array("tokens") == ["a", "", "<é>"], "metadata outlives the mapping"


@pytest.mark.parametrize(
    ("ask", "problem"),
    [
        (lambda f: f.text("none"), "key none is missing"),
        (lambda f: f.text("flag"), "key flag is a BOOL, wanted a STRING"),
        (lambda f: f.integer("flag"), "wanted an integer"),
        (lambda f: f.number("general.name"), "wanted a number"),
        (lambda f: f.number("nan"), "key nan is nan, wanted a finite number"),
        (lambda f: f.integer("{arch}.epsilon"), "key llama.epsilon is a FLOAT32"),
        (lambda f: f.flag("small"), "wanted a BOOL"),
        (lambda f: f.array("small"), "wanted an array"),
        (lambda f: f.array("tokens", ValueType.INT32), "an array of 3 STRING, wanted an array of"),
        (lambda f: f.load("none"), "has no tensor none"),
    ],
)
def test_a_getter_names_file_and_key(tmp_path, ask, problem):
    path = write(tmp_path / "a.gguf")
    with open_gguf(path) as file, pytest.raises(InputError) as error:
        ask(file)
    assert problem in str(error.value) and str(path) in str(error.value)


def test_tensors_are_those_that_gguf_reads(tmp_path):
    tensors = {
        "f32": RNG.random((2, 3, 5), np.float32),
        "f16": RNG.random((7,), np.float32).astype(np.float16),
        "i8": RNG.integers(-128, 128, (3, 5), np.int8),
        "i64": RNG.integers(-(2**40), 2**40, (3,), np.int64),
        "f64": RNG.random((2, 2)),
    }
    path = write(tmp_path / "a.gguf", tensors=tensors)
    peer = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    with open_gguf(path) as file:
        assert list(file.tensors) == list(tensors)
        for name, tensor in file.tensors.items():
            assert tensor.offset == peer[name].data_offset and tensor.nbytes == peer[name].n_bytes
            assert tensor.shape == tuple(map(int, peer[name].shape[::-1]))
            assert bytes(file.load(name)) == tensors[name].tobytes()
            got = dequantize(file.load(name), tensor.type, tensor.shape)
            assert got.dtype == np.float32
            assert np.array_equal(got, tensors[name].astype(np.float32))
            file.releaser(name)()


def test_types_are_those_of_ggml():
    known = {kind.name: (int(kind), *gguf.GGML_QUANT_SIZES[kind]) for kind in gguf.GGML_QUANT_SIZES}
    assert {kind.name: (int(kind), kind.block, kind.block_bytes) for kind in GGMLType} == known
    assert {k.name: int(k) for k in ValueType} == {k.name: int(k) for k in gguf.GGUFValueType}


@pytest.mark.parametrize("kind", sorted(DEQUANTIZABLE), ids=lambda kind: kind.name)
def test_every_type_dequantizes_as_gguf_does(kind):
    rows, length = 2100, 512  # more than a tile
    name = kind.name
    if kind.block == 1:
        pytest_type = {"F32": "<f4", "F16": "<f2", "F64": "<f8"}.get(name, f"<i{kind.block_bytes}")
        stored = (RNG.standard_normal((rows, length)) * 50).astype(pytest_type)
        if name == "BF16":
            stored = (RNG.random((rows, length), np.float32).view(np.uint32) >> 16).astype("<u2")
            expected = (stored.astype(np.uint32) << 16).view(np.float32)
        else:
            expected = stored.astype(np.float32)
    else:
        stored = RNG.integers(0, 256, (rows, kind.row_bytes(length)), np.uint8)
        with np.errstate(all="ignore"):
            expected = gguf.quants.dequantize(stored, gguf.GGMLQuantizationType(int(kind)))
    got = dequantize(memoryview(stored.tobytes()), kind, (rows, length))
    assert np.array_equal(got.view(np.uint32), expected.view(np.uint32))


def test_types_that_only_ggml_reads_are_refused_by_name():
    with pytest.raises(UnsupportedError, match=r"tensor x is of type Q8_K"):
        dequantize(memoryview(bytes(292)), GGMLType.Q8_K, (1, 256), "x")


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0"])
def test_quantize_is_that_of_gguf(kind):
    """Other types have scales of our own: see test_scale_search.py."""
    kind = GGMLType[kind]
    data = RNG.standard_normal((5, 900, 1024), np.float32)  # more than a window
    expected = gguf.quants.quantize(data, gguf.GGMLQuantizationType(int(kind)))
    assert quantize(data, kind) == expected.tobytes()


def test_q8_0_rounds_as_gguf_does():
    """Ties, zeros, denormals, huge and equal numbers, and whole rows at random scales."""
    whole = np.concatenate([np.arange(-127, 128), np.arange(-126.5, 127)])
    rows = [
        np.resize(whole, 512), np.resize(whole, 512) * 0.5, np.nextafter(np.resize(whole, 512), 0),
        np.zeros(512), np.full(512, -0.0), np.full(512, 3.0), np.full(512, 1e-45),
        np.resize([1e-38, -1e-40], 512), np.resize([65504.0, -1.0], 512), np.resize([127, 0.5], 512)
    ]  # fmt: skip
    rows += list(RNG.standard_normal((200, 512)) * 10.0 ** RNG.integers(-30, 4, (200, 1)))
    data = np.stack(rows).astype(np.float32)
    with np.errstate(all="ignore"):
        expected = gguf.quants.quantize(data, gguf.GGMLQuantizationType.Q8_0)
    got = np.frombuffer(quantize(data, GGMLType.Q8_0), np.uint8)
    assert np.array_equal(got.reshape(expected.shape), expected)


def test_what_cannot_be_stored_is_refused():
    with pytest.raises(UnsupportedError, match="beyond the largest F16"):
        quantize(np.array([[1.0, 70000.0]], np.float32), GGMLType.F16, "x")
    assert quantize(np.array([np.inf, np.nan]), GGMLType.F16)[:2] == b"\x00\x7c"
    large = np.full((1, 32), 70000.0, np.float32)
    with pytest.raises(UnsupportedError, match="beyond the largest F16"):
        quantize(large, GGMLType.Q4_0, "x")
    large[0, 3] = np.inf
    with pytest.raises(InputError, match="tensor x holds inf"):
        quantize(large, GGMLType.Q4_0, "x")
    with pytest.raises(InputError, match="tensor x holds nan"):
        quantize(np.full((1, 32), np.nan), GGMLType.Q8_0, "x")
    with pytest.raises(UnsupportedError, match="rows of 31 numbers"):
        quantize(np.zeros((1, 31)), GGMLType.Q8_0, "x")
    with pytest.raises(UnsupportedError, match="Q4_K"):
        quantize(np.zeros((1, 256)), GGMLType.Q4_K)
    assert storable_type(GGMLType.Q8_0, 64) is GGMLType.Q8_0
    assert storable_type(GGMLType.Q8_0, 31) is GGMLType.F16


@pytest.fixture
def split(tmp_path):
    tensors = {f"t{number}": RNG.random((2, 8), np.float32) for number in range(5)}
    write(tmp_path / "m.gguf", tensors=tensors, split_max_tensors=2)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [f"m-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    return tmp_path, names, tensors


def test_split_files_are_one(split):
    folder, names, tensors = split
    for name in names:
        with open_gguf(folder / name) as file:
            assert [path.name for path in file.sources] == names
            assert file.architecture == "llama" and list(file.tensors) == list(tensors)
            for key, data in tensors.items():
                assert bytes(file.load(key)) == data.tobytes()


def test_split_files_that_do_not_fit_together(split):
    folder, names, _ = split
    third = (folder / names[2]).read_bytes()
    (folder / names[2]).unlink()
    with pytest.raises(InputError, match=r"part 3 of 3 is missing: m-00003-of-00003\.gguf"):
        open_gguf(folder / names[0])
    (folder / names[2]).write_bytes((folder / names[1]).read_bytes())
    with pytest.raises(InputError, match="says that it is part 2 of 3, and its name says part 3"):
        open_gguf(folder / names[1])
    (folder / names[2]).write_bytes(third.replace(b"t4", b"t0"))
    with pytest.raises(InputError, match="has the tensor t0 of an earlier part again"):
        open_gguf(folder / names[0])
    (folder / names[2]).write_bytes(third)
    (folder / names[0]).rename(folder / "renamed.gguf")
    with pytest.raises(InputError, match="its name does not say which"):
        open_gguf(folder / "renamed.gguf")


def test_a_file_that_changes_is_noticed(tmp_path):
    path = write(tmp_path / "a.gguf")
    file = open_gguf(path)
    os.utime(path, ns=(1, 1))
    with pytest.raises(FileChangedError):
        file.close()


def test_pread_reads_the_same(tmp_path, monkeypatch):
    path = write(tmp_path / "a.gguf")
    with open_gguf(path) as file:
        mapped = bytes(file.load("a.weight"))
    monkeypatch.setenv("LORAFORMAT_IO", "pread")
    with open_gguf(path) as file:
        assert bytes(file.load("a.weight")) == mapped


def test_is_gguf(tmp_path):
    assert is_gguf(write(tmp_path / "a.gguf"))
    (tmp_path / "b").write_bytes(b"GGU")
    os.mkfifo(tmp_path / "fifo")
    for name in ("b", ".", "none", "fifo", "x" * 300):
        assert not is_gguf(tmp_path / name)
