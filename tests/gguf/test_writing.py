"""What is written is read back equal: by our reader, by gguf-py, and by llama.cpp."""

from __future__ import annotations

import subprocess
import sys

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llama_runtime import log_probabilities
from loraformat_converters.gguf.container.reader import GGUFFile, open_gguf
from loraformat_converters.gguf.container.types import GGMLType, ValueType
from loraformat_converters.gguf.container.values import GGUFValue
from loraformat_converters.gguf.container.writer import PlannedTensor, write_gguf
from loraformat_converters.gguf.quantization.blocks import (
    QUANTIZABLE,
    dequantize,
    quantize,
    quantized_tiles,
)
from peer_files import tiny_llama, write_peer_base

from loraformat.errors import InputError
from loraformat.storage.atomic_file import AtomicFile


def write(path, metadata, tensors) -> None:
    with AtomicFile(path, plan="test", force=True) as output:
        written = write_gguf(output, metadata, tensors)
        output.commit()
    assert written.bytes == path.stat().st_size


def planned(name, data: np.ndarray, kind=GGMLType.F32) -> PlannedTensor:
    return PlannedTensor(name, data.shape, kind, lambda: quantized_tiles(data, kind, name))


def copied(file: GGUFFile) -> list[PlannedTensor]:
    return [
        PlannedTensor(t.name, t.shape, t.type, lambda name=t.name: [file.load(name)])
        for t in file.tensors.values()
    ]


_INTEGERS = [kind for kind in ValueType if kind.is_integer]
_NAMES = st.text(st.characters(min_codepoint=32, exclude_characters="\x7f",
                               exclude_categories=["Cs"]), min_size=1, max_size=15)  # fmt: skip
_TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


def scalars(kind: ValueType) -> st.SearchStrategy:
    if kind is ValueType.STRING:
        return _TEXTS
    if kind is ValueType.BOOL:
        return st.booleans()
    if kind in (ValueType.FLOAT32, ValueType.FLOAT64):
        return st.floats(width=8 * kind.nbytes)
    bits, signed = 8 * kind.nbytes, kind.struct.islower()
    low = -(2 ** (bits - 1)) if signed else 0
    return st.integers(low, low + 2**bits - 1)


_SCALAR_TYPES = [kind for kind in ValueType if kind is not ValueType.ARRAY]
VALUES = st.one_of(
    *(scalars(kind).map(lambda v, k=kind: GGUFValue.of(k, v)) for kind in _SCALAR_TYPES),
    *(
        st.lists(scalars(kind), max_size=5).map(lambda v, k=kind: GGUFValue.of_array(k, v))
        for kind in _SCALAR_TYPES
    ),
)
SHAPES = st.lists(st.integers(1, 4), min_size=0, max_size=3)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    metadata=st.dictionaries(_NAMES, VALUES, max_size=6),
    shapes=st.dictionaries(
        _NAMES, st.tuples(SHAPES, st.sampled_from(sorted(GGMLType))), max_size=4
    ),
    alignment=st.sampled_from([None, 8, 32, 4096]),
    version_two=st.booleans(),
)
def test_any_file_comes_back(tmp_path, metadata, shapes, alignment, version_two):
    metadata.pop("general.alignment", None)
    if alignment:
        metadata["general.alignment"] = GGUFValue.of(ValueType.UINT32, alignment)
    tensors, contents = [], {}
    for seed, (name, (outer, kind)) in enumerate(shapes.items()):
        shape = (*outer, kind.block * (1 + seed % 3))
        plan = PlannedTensor(name, shape, kind, lambda: ())
        data = np.random.default_rng(seed).bytes(plan.nbytes)
        contents[name] = data
        pieces = [data[: seed + 3], memoryview(data)[seed + 3 :]]
        tensors.append(PlannedTensor(name, shape, kind, lambda pieces=pieces: pieces))
    path = tmp_path / "any.gguf"
    write(path, metadata, tensors)
    if version_two:  # the same but for its number
        with path.open("r+b") as file:
            file.seek(4)
            file.write(b"\x02")
    with open_gguf(path) as file:
        assert file.metadata == metadata and list(file.metadata) == list(metadata)
        assert list(file.tensors) == list(contents)
        for tensor, entry in zip(tensors, file.tensors.values(), strict=True):
            assert (entry.shape, entry.type) == (tensor.shape, tensor.type)
            assert entry.nbytes == tensor.nbytes and entry.offset % (alignment or 32) == 0
            assert file.load(entry.name) == contents[entry.name]
        again = tmp_path / "again.gguf"
        write(again, file.metadata, copied(file))
    if not version_two:
        assert again.read_bytes() == path.read_bytes()


def test_gguf_reads_what_is_written(tmp_path):
    rng = np.random.default_rng(0)
    metadata = {
        "general.architecture": GGUFValue.of(ValueType.STRING, "llama"),
        "tokens": GGUFValue.of_array(ValueType.STRING, ["a", "", "é"]),
        "scores": GGUFValue.of_array(ValueType.FLOAT32, [0.5, -1.0]),
        "flags": GGUFValue.of_array(ValueType.BOOL, [True, False]),
        **{
            f"n.{kind.name}": GGUFValue.of(kind, 7)
            for kind in ValueType
            if kind.nbytes and kind is not ValueType.BOOL
        },
    }
    data = {kind: rng.standard_normal((3, 5, 64), np.float32) for kind in sorted(QUANTIZABLE)}
    path = tmp_path / "a.gguf"
    write(path, metadata, [planned(k.name, d, k) for k, d in data.items()])
    reader = gguf.GGUFReader(path)
    fields = {name: field for name, field in reader.fields.items() if name in metadata}
    assert list(fields) == list(metadata)
    for name, value in metadata.items():
        assert fields[name].contents() == value.value
        assert fields[name].types[0] == int(value.type)
    with open_gguf(path) as file:
        assert list(file.tensors) == [kind.name for kind in data]
        for tensor, (kind, expected) in zip(reader.tensors, data.items(), strict=True):
            assert tensor.name == kind.name and tensor.tensor_type == int(kind)
            stored = quantize(expected, kind)
            assert tensor.data.tobytes() == stored
            back = dequantize(file.load(kind.name), kind, expected.shape)
            assert abs(back - expected).max() <= {4: 0, 2: 0.05}.get(kind.block_bytes, 0.6)


def test_llama_cpp_reads_what_is_written(tmp_path):
    model = tiny_llama()
    peer = write_peer_base(tmp_path / "peer.gguf", model)
    prompts = [[1, 270, 280]]
    expected = log_probabilities(peer, prompts)
    for alignment in (32, 1024):
        path = tmp_path / f"ours-{alignment}.gguf"
        with open_gguf(peer) as file:
            wide = {"general.alignment": GGUFValue.of(ValueType.UINT32, alignment)}
            write(path, file.metadata | wide, copied(file))
        assert np.array_equal(log_probabilities(path, prompts), expected)


def test_we_read_what_gguf_writes_split_as_llama_cpp_does(tmp_path):
    model = tiny_llama()
    whole = write_peer_base(tmp_path / "whole.gguf", model)
    write_peer_base(tmp_path / "parts.gguf", model, split_max_tensors=8)
    first = tmp_path / "parts-00001-of-00003.gguf"
    prompts = [[1, 270, 280]]
    assert np.array_equal(log_probabilities(first, prompts), log_probabilities(whole, prompts))
    with open_gguf(first) as parts, open_gguf(whole) as one:
        assert list(parts.tensors) == list(one.tensors)
        assert all(parts.load(name) == one.load(name) for name in one.tensors)


@pytest.mark.parametrize(
    ("tensor", "problem"),
    [
        (("x" * 64, (2,), GGMLType.F32), "name of 64 bytes"),
        (("", (2,), GGMLType.F32), "name of 0 bytes"),
        (("a\nb", (2,), GGMLType.F32), "control characters"),
        (("a", (), GGMLType.F32), "0 dimensions"),
        (("a", (1, 1, 1, 1, 1), GGMLType.F32), "5 dimensions"),
        (("a", (0, 32), GGMLType.Q8_0), "shape"),
        (("a", (2, 33), GGMLType.Q8_0), "rows of 33 numbers"),
    ],
)
def test_what_gguf_cannot_hold_is_not_written(tmp_path, tensor, problem):
    with pytest.raises(InputError, match=problem):
        write(tmp_path / "a.gguf", {}, [PlannedTensor(*tensor, lambda: ())])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("kind", "value"),
    [(ValueType.UINT8, 256), (ValueType.UINT32, -1), (ValueType.INT64, 2**63),
     (ValueType.FLOAT32, 1e40), (ValueType.UINT8, 1.5), (ValueType.BOOL, 1)],
)  # fmt: skip
def test_values_that_do_not_fit_their_type(kind, value):
    with pytest.raises(ValueError, match=kind.name):
        GGUFValue.of(kind, value)
    with pytest.raises(ValueError, match=kind.name):
        GGUFValue.of_array(kind, [value])


_WRITE_LARGE = """
import sys
from pathlib import Path
from loraformat.storage.atomic_file import AtomicFile
from loraformat_converters.gguf.container.types import GGMLType
from loraformat_converters.gguf.container.writer import PlannedTensor, write_gguf

chunk = 1 << 20
large = PlannedTensor("a", (64, chunk // 4), GGMLType.F32, lambda: map(bytes, [chunk] * 64))
small = PlannedTensor("b", (3,), GGMLType.F32, lambda: [bytes(12)])
with AtomicFile(Path(sys.argv[1]), plan="p") as output:
    write_gguf(output, {}, [large, small])
    output.commit()
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(int(status["VmHWM"].split()[0]))
"""


def test_a_large_tensor_is_never_whole_in_memory(tmp_path):
    """64 MiB in pieces of one: 16 MiB may wait for the disk, the rest is Python."""
    done = subprocess.run(
        [sys.executable, "-c", _WRITE_LARGE, str(tmp_path / "a.gguf")],
        stdout=subprocess.PIPE, check=True, text=True,
    )  # fmt: skip
    assert int(done.stdout) < 64 << 10
    with open_gguf(tmp_path / "a.gguf") as file:
        assert [tensor.nbytes for tensor in file.tensors.values()] == [64 << 20, 12]
