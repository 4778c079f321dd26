"""Package, minireader, bitsandbytes and schema hold to every vector."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from vectors import (
    EVERY,
    INDEX,
    NAMES,
    QUANTIZED,
    ROOT,
    SPEC,
    VECTORS,
    load,
    minireader,
    minireader_verdict,
)

from loraformat.bundle.integrity import verify_bundle
from loraformat.bundle.manifest_rules import parse_manifest
from loraformat.bundle.reader import open_bundle
from loraformat.errors import FormatError
from loraformat.tensors.arrays import array_bytes

quantized = pytest.mark.parametrize("vector", QUANTIZED, ids=[v["name"] for v in QUANTIZED])


@pytest.mark.parametrize(("kind", "vector"), EVERY, ids=NAMES)
def test_verdict_of_package_and_minireader(kind: str, vector: dict[str, Any]) -> None:
    path = VECTORS / kind / vector["name"]
    wanted = [vector["rule"]] if kind == "invalid" else []
    assert [finding.rule for finding in verify_bundle(path)] == wanted
    assert minireader_verdict(path) == vector.get("rule")


@pytest.mark.parametrize("vector", INDEX["invalid"], ids=[v["name"] for v in INDEX["invalid"]])
def test_finding_names_a_file_and_says_something(vector: dict[str, Any]) -> None:
    path = VECTORS / "invalid" / vector["name"]
    (finding,) = verify_bundle(path)
    assert finding.path.startswith(str(path))
    assert len(finding.problem) > 15


def test_every_rule_has_an_invalid_vector() -> None:
    text = (SPEC / "loraformat-1.1.md").read_text("utf-8")
    assert {v["rule"] for v in INDEX["invalid"]} == set(re.findall(r"\*\*\[(\w\d\d)\]\*\*", text))


@pytest.mark.parametrize(("kind", "vector"), EVERY, ids=NAMES)
def test_index_lists_the_files(kind: str, vector: dict[str, Any]) -> None:
    path = VECTORS / kind / vector["name"]
    found = {
        file.relative_to(path).as_posix(): sha256(file.read_bytes()).hexdigest()
        for file in path.rglob("*")
        if file.is_file()
    }
    assert found == vector["files"]


@pytest.mark.parametrize("vector", INDEX["valid"], ids=[v["name"] for v in INDEX["valid"]])
def test_fingerprint(vector: dict[str, Any]) -> None:
    with open_bundle(VECTORS / "valid" / vector["name"]) as bundle:
        assert bundle.manifest.fingerprint == vector["fingerprint"]


@quantized
def test_package_decodes_the_expected_values(vector: dict[str, Any]) -> None:
    from loraformat.model.checkpoint import NF4Tensor

    with open_bundle(VECTORS / "valid" / vector["name"]) as bundle:
        for name, wanted in vector["dequantized"].items():
            tensor = bundle.tensors[name]
            assert isinstance(tensor, NF4Tensor)
            assert list(tensor.shape) == wanted["shape"]
            for dtype, key in (("F32", "float32_sha256"), (wanted["dtype"], "dtype_sha256")):
                values = tensor.dequantize(dtype)
                assert list(values.shape) == wanted["shape"]
                assert sha256(array_bytes(values)).hexdigest() == wanted[key], (name, dtype)
            first = array_bytes(tensor.dequantize("F32"))[: 4 * len(wanted["float32_first"])]
            words = [int.from_bytes(first[i : i + 4], "little") for i in range(0, len(first), 4)]
            assert [f"{word:08x}" for word in words] == wanted["float32_first"]


def _bytes(values: Any) -> bytes:
    import torch

    return bytes(values.reshape(-1).view(torch.uint8).numpy().tobytes())


@quantized
def test_minireader_decodes_the_expected_values(vector: dict[str, Any]) -> None:
    import struct

    tensors, weights = minireader.verify(VECTORS / "valid" / vector["name"])
    for name, wanted in vector["dequantized"].items():
        values = minireader.decode(tensors[name], weights[name])
        data = struct.pack(f"<{len(values)}f", *values)
        assert sha256(data).hexdigest() == wanted["float32_sha256"]


_FLAT = [vector for vector in QUANTIZED if not vector["name"].startswith("segments")]


@pytest.mark.parametrize("vector", _FLAT, ids=[v["name"] for v in _FLAT])
def test_bitsandbytes_reads_the_same_state(vector: dict[str, Any]) -> None:
    """bitsandbytes' own `QuantState` and the plain formula give the expected values.

    Its CPU `dequantize_4bit` is not asked: it is wrong where rows are not whole blocks.
    """
    functional = import_module("bitsandbytes.functional")
    import torch
    from safetensors.torch import load_file

    path = VECTORS / "valid" / vector["name"]
    stored = load_file(path / "model-00001-of-00001.safetensors")
    manifest = json.loads((path / "loraformat.json").read_text("utf-8"))["tensors"]
    for name, wanted in vector["dequantized"].items():
        parts = {key: value for key, value in stored.items() if key.startswith(f"{name}.")}
        state = functional.QuantState.from_dict(parts, device=torch.device("cpu"))
        scales = state.absmax
        if state.nested:
            map_values = state.state2.code[scales.long()]
            scales = (
                map_values * state.state2.absmax.repeat_interleave(256)[: len(scales)]
                + state.offset
            )
        packed = stored[name].flatten()
        codes = torch.stack([packed >> 4, packed & 15], dim=1).flatten()[: state.shape.numel()]
        blocks = scales.repeat_interleave(state.blocksize)[: len(codes)]
        values = (state.code[codes.long()] * blocks).view(state.shape)
        values = values.T.contiguous() if manifest[name]["transposed"] else values
        assert sha256(_bytes(values)).hexdigest() == wanted["float32_sha256"]
        assert sha256(_bytes(values.to(state.dtype))).hexdigest() == wanted["dtype_sha256"]


def test_bitsandbytes_dequantizes_whole_blocks_to_the_same_bits() -> None:
    functional = import_module("bitsandbytes.functional")
    import torch
    from safetensors.torch import load_file

    (vector,) = (v for v in QUANTIZED if v["name"] == "nf4-double-quant")
    stored = load_file(VECTORS / "valid" / vector["name"] / "model-00001-of-00001.safetensors")
    ((name, wanted),) = vector["dequantized"].items()
    parts = {key: value for key, value in stored.items() if key.startswith(f"{name}.")}
    state = functional.QuantState.from_dict(parts, device=torch.device("cpu"))
    values = functional.dequantize_4bit(stored[name], state)
    assert sha256(_bytes(values)).hexdigest() == wanted["dtype_sha256"]


@pytest.mark.parametrize("vector", INDEX["valid"], ids=[v["name"] for v in INDEX["valid"]])
def test_safetensors_opens_every_shard(vector: dict[str, Any]) -> None:
    safe_open = import_module("safetensors").safe_open
    for path in (VECTORS / "valid" / vector["name"]).rglob("*.safetensors"):
        with safe_open(path, "np") as file:
            assert file.keys()


def test_our_quantizer_makes_the_vectors_bytes() -> None:
    """The encoder's advice: the package and the plain-Python encoder agree bit for bit."""
    import torch

    from tests import torch_codec as codec

    sys.path.insert(0, str(ROOT / "tools"))
    try:
        encoder = load(ROOT / "tools" / "vector_nf4.py")
    finally:
        sys.path.remove(str(ROOT / "tools"))
    for shape, block, double in (
        ([3, 40], 64, True),
        ([5, 13], 32, True),
        ([257, 32], 32, True),
        ([2, 2049], 4096, False),
        ([64], 64, True),
    ):
        values = encoder.sample(shape, "encoder", "F32")
        weight = encoder.Weight(shape, values, "F32", block, double)
        parts = encoder.encode(weight)
        ours = codec.quantize(torch.tensor(values), block_size=block, double_quant=double)
        assert _bytes(ours.packed) == parts[""][2]
        assert _bytes(ours.absmax) == parts[".absmax"][2]
        if double:
            assert ours.nested_absmax is not None
            assert _bytes(ours.nested_absmax) == parts[".nested_absmax"][2]


def _schema_validator() -> Any:
    from jsonschema import Draft202012Validator

    schema = json.loads((SPEC / "schema" / "manifest.schema.json").read_text("utf-8"))
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


#: Rules that the schema can see, and vectors of them that it cannot.
_SCHEMA_RULES = {"M02", "M03", "M04", "M05", "M06", "M07", "M08", "M09", "M11", "M13"}


#: Vectors with a manifest that a schema could read.
_WITH_MANIFEST = [
    pytest.param(kind, vector, id=name)
    for (kind, vector), name in zip(EVERY, NAMES, strict=True)
    if vector.get("rule") not in ("B01", "M01")
]


@pytest.mark.parametrize(("kind", "vector"), _WITH_MANIFEST)
def test_schema_and_parser_agree(kind: str, vector: dict[str, Any]) -> None:
    path = VECTORS / kind / vector["name"] / "loraformat.json"
    refused_by_schema = bool(list(_schema_validator().iter_errors(json.loads(path.read_bytes()))))
    try:
        parse_manifest(path.read_bytes(), path)
        rule = None
    except FormatError as error:
        rule = error.rule
    assert refused_by_schema == (rule in _SCHEMA_RULES)


@pytest.mark.parametrize("tool", [["make_vectors.py", "--check"], ["check_spec.py"]])
def test_tools(tool: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / tool[0]), *tool[1:]], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_minireader_from_the_command_line() -> None:
    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-I", str(SPEC / "minireader.py"), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True)

    sound = run(VECTORS / "valid" / "nf4-odd-count")
    assert sound.returncode == 0 and "fingerprint" in sound.stdout
    decoded = run(VECTORS / "valid" / "nf4-odd-count", "model.layers.0.mlp.up_proj.weight")
    assert len(decoded.stdout.split()) == 65
    broken = run(VECTORS / "invalid" / "n06-fp4")
    assert broken.returncode == 4 and broken.stdout.startswith("N06")


def test_minireader_needs_only_the_standard_library() -> None:
    source = (SPEC / "minireader.py").read_text("utf-8")
    imports = set(re.findall(r"^(?:import|from) (\w+)", source, re.MULTILINE))
    assert imports <= sys.stdlib_module_names
