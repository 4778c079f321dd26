"""Publishing: an adapter is held against its base, where that is on this machine."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from loraformat.demo import SMALL_MODEL
from tests.hub.conftest import BASE_COMMIT, Repository, files_of, published

BASE = ("--base-model", f"org/base@{BASE_COMMIT}")


@pytest.fixture
def stranger(shelf, tmp_path):
    """The adapter ``local``, of modules that its base does not have."""
    path = tmp_path / "local" / "adapter_model.safetensors"
    tensors = {name.replace("up_proj", "third_proj"): t for name, t in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})
    return shelf


def notes(result):
    assert result.returncode == 0, result.stderr
    return [
        note
        for note in json.loads(result.stdout)["notes"]
        if "local" in note or "compared with" in note
    ]


def test_without_a_base_nobody_knows(push, stranger):
    (note,) = notes(push("local", "me/new", *BASE, "--json"))  # of the rank, which is 24
    assert "TARGET_UNKNOWN" not in note
    assert note.endswith("run: loraformat check local")
    assert not [path for _, path in stranger.requests if "org/base/resolve/" in path]
    assert "### vLLM" in published(stranger)["README.md"].decode()


def test_against_the_base_that_is_named(push, stranger):
    (note,) = notes(push("local", "me/new", *BASE, "--base", SMALL_MODEL, "--json"))
    assert "vllm (TARGET_UNKNOWN)" in note
    assert note.endswith(f"run: loraformat check local --base {SMALL_MODEL}")
    assert "## Use" not in published(stranger)["README.md"].decode()


def test_against_the_path_that_the_adapter_names(push, stranger, tmp_path):
    shutil.copytree(SMALL_MODEL, tmp_path / "small_model")
    (note,) = notes(push("local", "me/new", *BASE, "--json"))
    assert note.endswith("run: loraformat check local --base small_model")


def test_against_what_the_cache_has(push, ask, stranger):
    stranger.repositories["org/base"] = Repository(files_of(SMALL_MODEL), BASE_COMMIT)
    assert ask("info", f"org/base@{BASE_COMMIT}").returncode == 0
    (note,) = notes(push("local", "me/new", *BASE, "--json"))
    assert note.endswith(f"run: loraformat check local --base org/base@{BASE_COMMIT}")


def test_a_base_that_cannot_be_opened(push, stranger, tmp_path):
    (tmp_path / "small_model").mkdir()
    first, _ = notes(push("local", "me/new", *BASE, "--json"))
    assert first.startswith("not compared with small_model: ")
    result = push("local", "me/other", *BASE, "--base", "small_model")
    assert result.returncode == 3
    assert "me/other" not in stranger.repositories


def test_a_bundle_is_its_own_base(push, shelf, ask, tmp_path):
    assert ask("convert", SMALL_MODEL, "bundle").returncode == 0
    result = push("bundle", "me/new", *BASE, "--base", SMALL_MODEL)
    assert result.returncode == 2
    assert "--base applies to adapters" in result.stderr
