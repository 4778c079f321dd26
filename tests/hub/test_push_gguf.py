"""Publishing: adapters for llama.cpp, alone and beside those that they were made of."""

import shutil

from loraformat.demo import SMALL_MODEL
from loraformat.ops.convert.convert import convert
from loraformat.ops.reduce import reduce
from tests.hub.conftest import PEFT, published


def test_with_gguf(push, shelf, tmp_path):
    result = push("adapter", "me/new", "--with-gguf")
    assert (result.returncode, result.stderr) == (0, "")
    files = published(shelf)
    assert "new-lora-f16.gguf" in files
    convert(tmp_path / "adapter", tmp_path / "own.gguf", dtype="f16", base=config_only(tmp_path))
    assert files["new-lora-f16.gguf"] == (tmp_path / "own.gguf").read_bytes()
    card = files["README.md"].decode()
    assert "llama-server -m base.gguf --lora new-lora-f16.gguf" in card
    assert not (tmp_path / "adapter" / "new-lora-f16.gguf").exists()
    assert "unchanged since commit" in push("adapter", "me/new", "--with-gguf").stdout


def config_only(tmp_path):
    shutil.copytree(
        SMALL_MODEL, tmp_path / "config-only", ignore=shutil.ignore_patterns("*.safetensors")
    )
    return tmp_path / "config-only"


def test_a_stale_gguf_of_other_weights_leaves(push, shelf, tmp_path):
    assert push("adapter", "me/new", "--with-gguf").returncode == 0
    shelf.repositories["me/new"].files["model-q8_0.gguf"] = b"somebody's own"
    reduce(tmp_path / "adapter", tmp_path / "smaller", rank=8)
    result = push("smaller", "me/new")
    assert result.returncode == 0, result.stderr
    assert "removed: new-lora-f16.gguf" in result.stdout
    assert sorted(published(shelf)) == ["README.md", *PEFT, "model-q8_0.gguf"]


def test_a_gguf_adapter_alone(push, shelf, tmp_path):
    convert(tmp_path / "adapter", tmp_path / "lora.gguf", base=config_only(tmp_path))
    result = push("lora.gguf", "me/new", "--base-model", "org/base")
    assert (result.returncode, result.stderr) == (0, "")
    files = published(shelf)
    assert sorted(files) == ["README.md", "lora.gguf"]
    assert "library_name: gguf" in files["README.md"].decode()
    result = push("lora.gguf", "me/new", "--base-model", "org/base", "--with-gguf")
    assert result.returncode == 2
