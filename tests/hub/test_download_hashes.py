"""What comes from the Hub is compared with the Hub's hashes: once, and also offline."""

import json
import os
import shutil

import pytest

from tests.hub.conftest import COMMIT


def snapshot(tmp_path):
    return tmp_path / "hf-home/hub/models--org--dense/snapshots" / COMMIT


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_corrupted_download_is_found_and_fetched_anew(ask, hub, tmp_path, name):
    hub.corrupt.add(name)
    result = ask("convert", "org/dense", "out")
    assert result.returncode == 7
    assert result.stderr.startswith(f"error: org/dense/{name}: does not match the Hub: its ")
    assert result.stderr.endswith("; run again to download it again\n")
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert not (snapshot(tmp_path) / name).exists()
    hub.corrupt.clear()
    hub.requests.clear()
    assert ask("convert", "org/dense", "out").returncode == 0
    assert hub.bodies() == [name]


def test_an_old_file_is_named_and_left_alone(ask, hub, tmp_path):
    """It was there before this run: who changed it may want it."""
    assert ask("info", "org/dense").returncode == 0
    blob = (snapshot(tmp_path) / "model.safetensors").resolve()
    changed = bytearray(blob.read_bytes())
    changed[-1] ^= 1
    blob.write_bytes(changed)
    os.utime(blob, (0, 0))  # no download's file, however soon after this one begins
    for environment in ({}, {"HF_HUB_OFFLINE": "1"}):
        result = ask("info", "org/dense", **environment)
        assert result.returncode == 7
        assert f"remove {blob} and run again" in result.stderr
    assert blob.read_bytes() == changed
    blob.unlink()
    assert ask("info", "org/dense").returncode == 0


def test_a_file_is_hashed_once(ask, hub, tmp_path):
    assert ask("info", "org/dense").returncode == 0
    (memory,) = (tmp_path / "hf-home/loraformat/verified").iterdir()
    known = json.loads(memory.read_bytes())
    assert len(known) == 4
    before = memory.stat().st_mtime_ns
    hub.requests.clear()
    assert ask("info", "org/dense").returncode == 0
    assert memory.stat().st_mtime_ns == before
    assert not any("/tree/" in path for way, path in hub.requests)


@pytest.mark.parametrize("rubbish", [b"[", b"[]", b'{"x": 1}', b"\xff"])
def test_a_damaged_memory_is_no_hindrance(ask, hub, tmp_path, rubbish):
    assert ask("info", "org/dense").returncode == 0
    (memory,) = (tmp_path / "hf-home/loraformat/verified").iterdir()
    memory.write_bytes(rubbish)
    assert ask("info", "org/dense", HF_HUB_OFFLINE="1").returncode == 0
    assert len(json.loads(memory.read_bytes())) >= 4


def test_offline_a_blob_must_have_the_hash_that_names_it(ask, hub, tmp_path):
    assert ask("info", "org/dense").returncode == 0
    shutil.rmtree(tmp_path / "hf-home/loraformat")
    assert ask("info", "org/dense", HF_HUB_OFFLINE="1").returncode == 0
    shutil.rmtree(tmp_path / "hf-home/loraformat")
    blob = (snapshot(tmp_path) / "config.json").resolve()
    blob.write_bytes(blob.read_bytes().replace(b"{", b"[", 1))
    result = ask("info", "org/dense", HF_HUB_OFFLINE="1")
    assert result.returncode == 7
    assert "git SHA-1" in result.stderr


def test_a_hub_that_fails_is_no_hindrance_for_what_is_here(ask, hub, tmp_path):
    assert ask("info", "org/dense").returncode == 0
    shutil.rmtree(tmp_path / "hf-home/loraformat")
    hub.failing = 418
    assert ask("info", "org/dense").returncode == 0
    shutil.rmtree(tmp_path / "hf-home/loraformat")
    blob = (snapshot(tmp_path) / "config.json").resolve()
    blob.write_bytes(blob.read_bytes().replace(b"{", b"[", 1))
    assert ask("info", "org/dense").returncode == 7
