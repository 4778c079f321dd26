"""Inputs from the Hub: what is fetched, what is recorded, and what is said when it fails."""

import errno
import json
import shutil
import socket
from pathlib import Path

import pytest

from loraformat.errors import ResourceError
from loraformat.hub import source as module

COMMIT = "c" * 40
WANTED = ["README.md", "config.json", "model.safetensors", "tokenizer.json"]


def one_line(text):
    return text.startswith("error: ") and text.count("\n") == 1 and "Traceback" not in text


def cache(tmp_path, repo="org/dense"):
    return tmp_path / "hf-home" / "hub" / f"models--{repo.replace('/', '--')}"


def blobs(tmp_path, snapshot):
    return snapshot(cache(tmp_path) / "blobs")


def test_convert(ask, hub, tmp_path):
    result = ask("convert", "org/dense@v1", "out", "--quiet", "--max-shard-size", "6kB")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    manifest = json.loads((tmp_path / "out" / "loraformat.json").read_text())
    assert manifest["source"] == {"format": "safetensors", "repo": "org/dense", "revision": COMMIT}
    assert hub.bodies() == WANTED
    assert (tmp_path / "out" / "README.md").read_bytes() == b"# A model\n"
    assert ask("verify", "out").returncode == 0


@pytest.mark.parametrize("suffix", ["", "@main", f"@{COMMIT}"])
def test_info(ask, hub, suffix):
    result = ask("info", f"org/dense{suffix}", "--json")
    assert (result.returncode, result.stderr) == (0, "")
    assert json.loads(result.stdout)["layers"] == 6


def test_info_and_verify_of_a_bundle(ask, hub, hub_bundle):
    said = json.loads(ask("info", "org/bundle", "--json").stdout)
    assert said["format"] == "loraformat"
    result = ask("verify", "org/bundle@main")
    assert result.returncode == 0
    assert "every hash matches" in result.stdout


def test_verify_finds_what_the_hub_got_wrong(ask, hub, hub_bundle):
    files = hub.repositories["org/bundle"].files
    name = max(files, key=lambda path: len(files[path]))
    data = bytearray(files[name])
    data[4096] ^= 1
    files[name] = bytes(data)
    result = ask("verify", "org/bundle")
    assert result.returncode == 4
    assert result.stdout.startswith("V01: ")


def test_the_second_run_uses_the_cache(ask, hub, tmp_path):
    assert ask("info", "org/dense").returncode == 0
    first = len(hub.requests)
    assert ask("convert", "org/dense", "out", "--to", "safetensors").returncode == 0
    assert hub.bodies() == WANTED  # each once
    assert len(hub.requests) - first == 1  # where main points to now


def test_offline_with_the_cache(ask, hub, tmp_path):
    assert ask("info", "org/dense").returncode == 0
    hub.requests.clear()
    for word in ("org/dense", f"org/dense@{COMMIT}"):
        result = ask("info", word, HF_HUB_OFFLINE="1")
        assert result.returncode == 0
    assert hub.requests == []


def test_offline_without_the_cache(ask, hub):
    result = ask("info", "org/dense", HF_HUB_OFFLINE="1")
    assert result.returncode == 7
    assert result.stderr == (
        "error: org/dense: is not in the cache, and HF_HUB_OFFLINE is set; "
        "unset it, or use a local path\n"
    )
    assert hub.requests == []


def test_a_repository_that_does_not_exist(ask, hub):
    result = ask("convert", "org/nowhere", "out")
    assert result.returncode == 7
    assert result.stderr == (
        "error: org/nowhere: is neither a local path nor a repository on the Hub; "
        "check the spelling; for a private repository run: hf auth login\n"
    )


def test_a_revision_that_does_not_exist(ask, hub):
    result = ask("info", "org/dense@v9")
    assert result.returncode == 7
    assert result.stderr.startswith("error: org/dense@v9: has no such revision; see")
    assert one_line(result.stderr)


def test_a_gated_repository(ask, hub):
    hub.gated.add("org/dense")
    result = ask("info", "org/dense")
    assert result.returncode == 7
    assert one_line(result.stderr)
    assert "is gated; accept its terms on the Hub, then run: hf auth login" in result.stderr


@pytest.mark.parametrize("status", [500, 418])
def test_a_server_out_of_order(ask, hub, status):
    hub.failing = status
    result = ask("info", "org/dense")
    assert result.returncode == 7
    assert one_line(result.stderr)
    assert f"HTTP status {status}" in result.stderr
    assert "check the network" in result.stderr


def test_connection_refused(ask, hub):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}"
        result = ask("info", "org/dense", HF_ENDPOINT=nobody)
    assert result.returncode == 7
    assert one_line(result.stderr)
    assert "check the network" in result.stderr


def test_a_name_that_no_repository_can_have(ask, hub):
    result = ask("info", "org/a--b")
    assert result.returncode == 7
    assert one_line(result.stderr)
    assert "valid Hub id" in result.stderr
    assert hub.requests == []


def test_a_repository_without_weights(ask, hub):
    files = hub.repositories["org/dense"].files
    del files["model.safetensors"]
    result = ask("info", "org/dense")
    assert result.returncode == 3
    assert one_line(result.stderr)


def test_the_cache_is_full_of_links_and_never_written_through(ask, hub, tmp_path, snapshot):
    assert ask("info", "org/dense").returncode == 0
    snapshot_directory = cache(tmp_path) / "snapshots" / COMMIT
    assert (snapshot_directory / "model.safetensors").is_symlink()
    before = blobs(tmp_path, snapshot)
    assert ask("convert", "org/dense", "out", "--to", "safetensors").returncode == 0
    result = ask("convert", "org/dense", snapshot_directory, "--force", "--to", "safetensors")
    assert result.returncode == 5
    result = ask("convert", snapshot_directory, snapshot_directory / "out", "--to", "safetensors")
    assert result.returncode == 5
    assert blobs(tmp_path, snapshot) == before
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))


def test_a_snapshot_may_be_named_as_a_path(ask, hub, tmp_path):
    assert ask("info", "org/dense").returncode == 0
    assert ask("info", cache(tmp_path) / "snapshots" / COMMIT).returncode == 0


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_link_that_leaves_the_repository_is_refused(ask, hub, model, tmp_path, name):
    assert ask("info", "org/dense").returncode == 0
    link = cache(tmp_path) / "snapshots" / COMMIT / name
    link.unlink()
    link.symlink_to(model / name)
    for word in ("org/dense", link.parent):
        result = ask("convert", word, "out", HF_HUB_OFFLINE="1")
        assert result.returncode == 3
        assert one_line(result.stderr)
        assert "leads out of its directory" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_local_path_wins(ask, hub, model, tmp_path):
    (tmp_path / "org").mkdir()
    shutil.move(model, tmp_path / "org" / "dense")
    result = ask("info", "org/dense", "--json")
    assert result.returncode == 0
    assert json.loads(result.stdout)["path"] == "org/dense"
    assert hub.requests == []


def test_a_local_output_is_never_asked_for_on_the_hub(ask, hub, model, tmp_path):
    (tmp_path / "org").mkdir()
    assert ask("convert", model, "org/new", "--to", "safetensors").returncode == 0
    assert hub.requests == []


@pytest.mark.parametrize(
    "word",
    [
        "a/b/c",
        "./org/name",
        "/org/name",
        "org/name@",
        "org//name",
        "name",
        "org/na me",
        "org/näme",
        "./name",
        "../name",
        "name/.",
        "name/..",
        "-o/name",
    ],
)
def test_words_that_are_no_hub_id(monkeypatch, tmp_path, word):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "download", lambda *word: pytest.fail("asked the Hub"))
    with pytest.raises(module.InputError, match="no such file or directory"):
        module.resolve(word)


def test_an_empty_word_is_not_the_working_directory():
    with pytest.raises(module.InputError, match="is empty"):
        module.resolve("")


@pytest.mark.parametrize(
    ("word", "asked"),
    [
        ("org/name", ("org/name", None)),
        ("org/name@v1.0", ("org/name", "v1.0")),
        ("org/name@refs/pr/1", ("org/name", "refs/pr/1")),
        ("o-r.g/n_a.me-1", ("o-r.g/n_a.me-1", None)),
    ],
)
def test_words_that_are(monkeypatch, tmp_path, word, asked):
    monkeypatch.chdir(tmp_path)
    seen = []
    monkeypatch.setattr(module, "download", lambda *a: seen.append(a) or Path("x"))
    monkeypatch.setattr(module, "_one_gguf", lambda *a: None)
    source = module.resolve(word)
    assert seen == [asked]
    assert (source.repo, source.revision) == asked


def test_a_full_cache_is_a_full_disk(monkeypatch):
    import huggingface_hub

    def fail(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ResourceError, match="HF_HOME"):
        module.download("org/name", None)
