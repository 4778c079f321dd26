"""Fetching a repository: at one commit, every file compared, whole or not at all."""

import json
import os
import signal
import time

import pytest

from tests.hub.conftest import BASE_COMMIT, COMMIT, TOKEN, Repository, files_of


@pytest.fixture
def published(shelf, tmp_path):
    """``org/adapter`` on the Hub, with a card and things that nobody wants."""
    files = files_of(tmp_path / "adapter")
    files |= {
        "README.md": b"---\nbase_model: org/base\n---\n# An adapter\n",
        ".gitattributes": b"x",
        "adapter_model.bin": b"a pickle",
        "checkpoint-5/optimizer.pt": b"a pickle",
        "lora.gguf": b"GGUF",
        "pictures/loss.png": b"png",
    }
    shelf.repositories["org/adapter"] = Repository(files, card={"base_model": "org/base"})
    return shelf


WANTED = [
    "README.md", "adapter_config.json", "adapter_model.safetensors", "lora.gguf",
    "pictures/loss.png",
]  # fmt: skip


def wanted_of(server):
    files = server.repositories["org/adapter"].files
    return {name: files[name] for name in WANTED}


def test_pull(ask, published, tmp_path):
    result = ask("pull", "org/adapter@v1", "out", "--json")
    assert (result.returncode, result.stderr) == (0, "")
    said = json.loads(result.stdout)
    assert (said["repo"], said["commit"], said["format"]) == ("org/adapter", COMMIT, "peft")
    assert said["left_out"] == [".gitattributes", "adapter_model.bin", "checkpoint-5/optimizer.pt"]
    assert files_of(tmp_path / "out") == wanted_of(published)
    assert [path.name for path in tmp_path.glob("out*")] == ["out"]
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    assert ask("verify", "out").returncode == 0


def test_some_of_it(ask, published, tmp_path):
    result = ask("pull", "org/adapter", "out", "--include", "*.gguf", "--include", "*.bin")
    assert result.returncode == 0, result.stderr
    assert sorted(files_of(tmp_path / "out")) == ["adapter_model.bin", "lora.gguf"]
    assert ask("pull", "org/adapter", "none", "--include", "*.xyz").returncode == 3


def test_dry_run(ask, published, tmp_path):
    result = ask("pull", "org/adapter", "out", "--dry-run", "--with-base")
    assert result.returncode == 0, result.stderr
    assert "would fetch 578 kB to out" in result.stdout
    assert "base org/base" in result.stdout
    assert published.bodies() == []
    assert not (tmp_path / "out").exists()


def test_with_base(ask, published, tmp_path):
    result = ask("pull", "org/adapter", "out", "--with-base", "--json")
    assert result.returncode == 0, result.stderr
    said = json.loads(result.stdout)
    assert (said["base_model"], said["base_revision"]) == ("org/base", BASE_COMMIT)
    assert files_of(said["base_path"]).keys() == {"config.json"}
    assert ask("pull", "org/base", "base", "--with-base").stdout.endswith(
        "note: names no base model on the Hub; nothing else was downloaded\n"
    )


def test_a_branch_that_moves_meanwhile_is_one_commit(ask, published, tmp_path):
    """What is fetched is pinned to the commit that was found first."""
    repository = published.repositories["org/adapter"]
    before = wanted_of(published)
    new = repository.add_commit("main", COMMIT, {**repository.files, "README.md": b"new"}, "x")

    find = repository.find

    def moving(revision):
        commit = find(revision)
        repository.branches["main"] = new
        return commit

    repository.find = moving
    assert ask("pull", "org/adapter", "out").returncode == 0
    assert repository.branches["main"] == new
    assert files_of(tmp_path / "out") == before


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_corrupted_file_is_found_and_only_it_is_fetched_again(ask, published, tmp_path, name):
    published.corrupt.add(name)
    result = ask("pull", "org/adapter", "out")
    assert result.returncode == 7
    assert result.stderr.startswith(f"error: org/adapter/{name}: does not match the Hub: its ")
    assert result.stderr.endswith("; run again to download it again\n")
    assert not (tmp_path / "out").exists()
    published.corrupt.clear()
    published.requests.clear()
    result = ask("pull", "org/adapter", "out", "--json")
    assert result.returncode == 0, result.stderr
    assert published.bodies() == [name]
    status = {file["path"]: file["status"] for file in json.loads(result.stdout)["files"]}
    assert status == dict.fromkeys(WANTED, "kept") | {name: "fetched"}
    assert files_of(tmp_path / "out") == wanted_of(published)


def test_a_killed_pull_goes_on(begin, ask, published, tmp_path):
    published.slow = {"adapter_model.safetensors"}
    process, _ = begin("pull", "org/adapter", "out")
    arrived = tmp_path / "out.partial" / ".arriving"
    for _ in range(3000):
        if (arrived / "pictures" / "loss.png").exists() and (arrived / "lora.gguf").exists():
            break
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not (tmp_path / "out").exists()
    published.slow = set()
    published.requests.clear()
    result = ask("pull", "org/adapter", "out")
    assert result.returncode == 0, result.stderr
    assert "adapter_model.safetensors" in published.bodies()
    assert "lora.gguf" not in published.bodies()
    assert files_of(tmp_path / "out") == wanted_of(published)
    assert not (tmp_path / "out.partial").exists()


def test_another_commit_begins_anew(ask, published, tmp_path):
    published.corrupt.add("adapter_config.json")
    assert ask("pull", "org/adapter", "out").returncode == 7
    published.corrupt.clear()
    repository = published.repositories["org/adapter"]
    files = {**repository.files, "lora.gguf": b"another"}
    repository.branches["main"] = repository.add_commit("main", COMMIT, files, "x")
    assert ask("pull", "org/adapter", "out").returncode == 0
    assert files_of(tmp_path / "out") == wanted_of(published)


def test_an_output_that_exists(ask, published, tmp_path):
    assert ask("pull", "org/adapter", "out").returncode == 0
    published.requests.clear()
    result = ask("pull", "org/adapter", "out")
    assert result.returncode == 5
    assert published.bodies() == []
    assert ask("pull", "org/adapter", "out", "--force").returncode == 0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    assert ask("pull", "org/adapter", "mine", "--force").returncode == 5
    assert files_of(tmp_path / "mine") == {"thesis.txt": b"x"}


@pytest.mark.parametrize(
    "name",
    ["../evil", "a/../../evil", "/etc/evil", "C:\\evil", "con", "a\nb", "x" * 300, "LORA.gguf"],
)
def test_names_that_are_traps(ask, published, tmp_path, name):
    """``LORA.gguf`` beside ``lora.gguf`` is one file where case does not count."""
    published.repositories["org/adapter"].files[name] = b"x"
    before = sorted(path.name for path in tmp_path.parent.rglob("*evil*"))
    result = ask("pull", "org/adapter", "out")
    assert result.returncode in (3, 7)
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert published.bodies() == []
    assert not (tmp_path / "out").exists()
    assert sorted(path.name for path in tmp_path.parent.rglob("*evil*")) == before


@pytest.mark.parametrize(
    ("word", "code", "said"),
    [
        ("org/nowhere", 7, "is not a repository on the Hub"),
        ("org/adapter@v9", 7, "has no such revision"),
        ("adapter", 2, "is not a repository id: wanted ORG/NAME"),
        ("org/a--b", 7, "is not a valid Hub id"),
    ],
)
def test_words_that_lead_nowhere(ask, published, word, code, said):
    result = ask("pull", word, "out")
    assert result.returncode == code
    assert said in result.stderr
    assert result.stderr.count("\n") == 1


def test_an_empty_target_is_not_the_working_directory(ask, published):
    result = ask("pull", "org/adapter", "", "--force")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert published.requests == []


def test_a_gated_repository(ask, published):
    published.gated.add("org/adapter")
    result = ask("pull", "org/adapter", "out")
    assert result.returncode == 7
    assert "is gated; accept its terms on the Hub, then run: hf auth login" in result.stderr


def test_offline(ask, published):
    result = ask("pull", "org/adapter", "out", HF_HUB_OFFLINE="1")
    assert result.returncode == 7
    assert result.stderr.count("\n") == 1
    assert published.requests == []


def test_there_and_back(ask, push, shelf, tmp_path):
    assert push("adapter", "me/new", "--private").returncode == 0
    assert ask("pull", "me/new", "back").returncode == 7  # private, and nobody is logged in
    assert ask("pull", "me/new", "back", HF_TOKEN=TOKEN).returncode == 0
    back, sent = files_of(tmp_path / "back"), files_of(tmp_path / "adapter")
    assert back.pop("README.md").startswith(b"---\nbase_model: org/base\n")
    assert back == sent
