"""Publishing and fetching through Xet, with hf_xet's own local store behind the Hub."""

import hashlib
import os
import shutil

import pytest

from tests.hub.conftest import TOKEN, files_of

XET = {"HF_HUB_DISABLE_XET": "0", "HF_TOKEN": TOKEN}


@pytest.fixture
def xet(shelf, tmp_path):
    shelf.xet_store = tmp_path / "store"
    shelf.xet_store.mkdir()
    for path in tmp_path.glob("*/*.safetensors"):
        data = path.read_bytes()  # which the store will have in compressed chunks only
        shelf.known[hashlib.sha256(data).hexdigest()] = data
    return shelf


def test_there_and_back(ask, xet, tmp_path):
    result = ask("push", "adapter", "me/new", **XET)
    assert (result.returncode, result.stderr) == (0, "")
    assert xet.uploads() == 0
    assert len(xet.xet_hashes) == 1
    assert any("/xet-write-token/" in path for way, path in xet.requests)
    result = ask("pull", "me/new", "back", **XET)
    assert (result.returncode, result.stderr) == (0, "")
    assert any("/xet-read-token/" in path for way, path in xet.requests)
    assert "adapter_model.safetensors" not in xet.bodies()
    back = files_of(tmp_path / "back")
    del back["README.md"]
    assert back == files_of(tmp_path / "adapter")
    assert "unchanged since commit" in ask("push", "adapter", "me/new", **XET).stdout
    assert ask("info", "me/new", **XET).returncode == 0
    assert ask("info", "me/new", **XET, HF_HUB_OFFLINE="1").returncode == 0
    assert ask("convert", "me/new", "copy", **XET).returncode == 0


def test_a_cache_that_repositories_share(ask, xet, tmp_path):
    """A large file is a link to a link; its name there is no SHA-256."""
    assert ask("push", "adapter", "me/new", **XET).returncode == 0
    assert ask("info", "me/new", **XET).returncode == 0
    (snapshot,) = (tmp_path / "hf-home/hub/models--me--new/snapshots").iterdir()
    shared = (snapshot / "adapter_model.safetensors").resolve()
    assert shared.is_relative_to(tmp_path / "hf-home/hub/blobs")
    shutil.rmtree(tmp_path / "hf-home/loraformat")
    assert ask("info", "me/new", **XET, HF_HUB_OFFLINE="1").returncode == 0
    shared.write_bytes(b"\0" + shared.read_bytes()[1:])
    os.utime(shared, (0, 0))  # no download's file, however soon the next one begins
    result = ask("info", "me/new", **XET, HF_HUB_OFFLINE="1")
    assert result.returncode == 7
    assert "its SHA-256 is" in result.stderr
    (tmp_path / "hf-home/hub/blobs/.huggingface-shared-blobs").unlink()
    assert "leads out of its directory" in ask("info", "me/new", **XET).stderr
