"""Package and miniundo hold to every vector of undo records, with every kernel."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from vectors import SPEC, VECTORS, load

from loraformat.errors import FormatError
from loraformat.model.adapter import Adapter, LoraDelta
from loraformat.model.checkpoint import DenseTensor
from loraformat.nf4 import kernels
from loraformat.ops.unmerge.unmerge import unmerge
from loraformat.storage.safe_directory import SafeDirectory
from loraformat.tensors.mapped import MappedFile

UNDO = VECTORS / "undo"
INDEX: dict[str, list[dict[str, Any]]] = json.loads((UNDO / "index.json").read_text("utf-8"))
EVERY = [(kind, vector) for kind in ("valid", "invalid") for vector in INDEX[kind]]
NAMES = [f"{kind}/{vector['name']}" for kind, vector in EVERY]
miniundo = load(SPEC / "miniundo.py")


def adapters_of(folder: Path) -> list[Adapter]:
    """Open the adapters of a vector."""
    return [open_adapter(path) for path in sorted(folder.glob("adapter-*.safetensors"))]


def open_adapter(path: Path) -> Adapter:
    """Open deltas that are written in the terms of the specification."""
    file = MappedFile(SafeDirectory(path.parent), path.name)

    def leaf(target: str, name: str) -> DenseTensor | None:
        entry = file.header.entries.get(f"{target}.{name}")
        if entry is None:
            return None
        return DenseTensor(entry.name, entry.dtype, entry.shape, lambda: file.view(entry.name))

    deltas = {}
    for target, text in file.header.metadata.items():
        a, b = leaf(target, "a"), leaf(target, "b")
        assert a is not None and b is not None
        about = json.loads(text)
        deltas[target] = LoraDelta(
            target, a, b, about["scaling"], orientation=about["orientation"],
            magnitude=leaf(target, "magnitude"), bias=leaf(target, "bias"),
        )  # fmt: skip
    return Adapter(path, "vector", deltas)


def undone(folder: Path, scratch: Path) -> Path:
    """Undo a vector with the package; return the original's directory."""
    merged = scratch / "merged"
    merged.mkdir()
    shutil.copy(folder / "merged.safetensors", merged / "model.safetensors")
    (merged / "config.json").write_text('{"model_type": "llama"}')
    unmerge(merged, scratch / "back", undo=folder / "undo.lfu", adapter=adapters_of(folder))
    return scratch / "back"


def restored(folder: Path) -> dict[str, bytes]:
    """Read a safetensors file with the minireader."""
    tensors = miniundo.read_header(folder / "model.safetensors", profile=False)[0]
    return {name: bytes(entry["data"]) for name, entry in tensors.items()}


@pytest.mark.parametrize("kernel", kernels.available())
@pytest.mark.parametrize("vector", INDEX["valid"], ids=[v["name"] for v in INDEX["valid"]])
def test_the_original_comes_back(
    vector: dict[str, Any], kernel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(kernels.VARIABLE, kernel)
    folder = UNDO / "valid" / vector["name"]
    wanted = {name: tensor["sha256"] for name, tensor in vector["restored"].items()}
    back = undone(folder, tmp_path)
    found = restored(back)
    assert {name: sha256(data).hexdigest() for name, data in found.items()} == wanted
    assert all(found[n][:16].hex() == t["first"] for n, t in vector["restored"].items())
    assert {n: sha256(d).hexdigest() for n, d in miniundo.undo(folder).items()} == wanted
    if vector["config"] is not None:
        assert (back / "config.json").read_text("utf-8") == vector["config"]


@pytest.mark.parametrize("vector", INDEX["invalid"], ids=[v["name"] for v in INDEX["invalid"]])
def test_one_rule_is_named(vector: dict[str, Any], tmp_path: Path) -> None:
    folder = UNDO / "invalid" / vector["name"]
    with pytest.raises(FormatError) as caught:
        undone(folder, tmp_path)
    assert caught.value.rule == vector["rule"]
    assert not (tmp_path / "back").exists()
    with pytest.raises(miniundo.Broken) as broken:
        miniundo.undo(folder)
    assert str(broken.value)[:3] == vector["rule"]


def test_every_rule_has_an_invalid_vector() -> None:
    text = (SPEC / "undo-1.0.md").read_text("utf-8")
    assert {v["rule"] for v in INDEX["invalid"]} == set(re.findall(r"\*\*\[(U\d\d)\]\*\*", text))


@pytest.mark.parametrize(("kind", "vector"), EVERY, ids=NAMES)
def test_index_lists_the_files(kind: str, vector: dict[str, Any]) -> None:
    folder = UNDO / kind / vector["name"]
    found = {file.name: sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}
    assert found == vector["files"]


def test_miniundo_as_a_program(tmp_path: Path) -> None:
    command = [sys.executable, SPEC / "miniundo.py", UNDO / "valid" / "bf16", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    for line in done.stdout.splitlines():
        digest, name = line.split()
        assert sha256((tmp_path / name).read_bytes()).hexdigest() == digest
    command[2] = UNDO / "invalid" / "u05-digest"
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 4 and done.stderr.startswith("U05")
