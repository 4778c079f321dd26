"""Publishing: what appears on the Hub, and that it appears at once."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from loraformat.demo import SMALL_MODEL
from loraformat.ops.convert.convert import convert
from tests.hub.conftest import PEFT, files_of, published


def test_an_adapter(push, shelf, tmp_path):
    before = files_of(tmp_path / "adapter")
    result = push("adapter", "me/new")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.rstrip().endswith(f"{shelf.endpoint}/me/new")
    files = published(shelf)
    assert sorted(files) == ["README.md", *PEFT]
    assert {name: files[name] for name in PEFT} == {name: before[name] for name in PEFT}
    assert shelf.repositories["me/new"].log == [("main", "Upload adapter with loraformat 0.1.0")]
    assert files_of(tmp_path / "adapter") == before
    card = files["README.md"].decode()
    assert "base_model: org/base\n" in card
    assert "license: apache-2.0\n" in card
    for name in PEFT:
        assert hashlib.sha256(files[name]).hexdigest() in card


def writes(server):
    return [path for way, path in server.requests if way == "POST" and "/commit/" in path]


def test_pushing_again_changes_nothing(push, shelf):
    assert push("adapter", "me/new", "--tag", "v1.0").returncode == 0
    uploads, commits = shelf.uploads(), len(writes(shelf))
    result = push("adapter", "me/new", "--tag", "v1.0")
    assert result.returncode == 0
    assert "unchanged since commit" in result.stdout
    assert (shelf.uploads(), len(writes(shelf))) == (uploads, commits)
    repository = shelf.repositories["me/new"]
    assert repository.tags == {"v1.0": repository.commit}


def test_dry_run(push, shelf):
    result = push("adapter", "me/new", "--dry-run", HF_TOKEN="")
    assert (result.returncode, result.stderr) == (0, "")
    assert "adapter_model.safetensors   577 kB  new" in result.stdout
    assert "base_model: org/base" in result.stdout
    assert 'PeftModel.from_pretrained(model, "me/new")' in result.stdout
    assert "me/new" not in shelf.repositories
    assert not [way for way, path in shelf.requests if way != "GET"]


def test_dry_run_without_a_hub(push, shelf):
    result = push("adapter", "me/new", "--dry-run", "--json", HF_HUB_OFFLINE="1")
    assert result.returncode == 0, result.stderr
    said = json.loads(result.stdout)
    offline = "is not in the cache, and HF_HUB_OFFLINE is set"
    assert f"base model org/base: {offline}" in said["notes"]
    assert f"the Hub was not queried about me/new: {offline}" in said["notes"]
    assert said["commit"] is None
    assert {file["status"] for file in said["files"]} == {"not asked"}


def test_a_dry_run_compares_with_the_hub(push, shelf, tmp_path):
    assert push("adapter", "me/new").returncode == 0
    (tmp_path / "adapter" / "loss.png").write_bytes(b"png")
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(config.read_text() + "\n")
    said = json.loads(push("adapter", "me/new", "--dry-run", "--json").stdout)
    assert {file["path"]: file["status"] for file in said["files"]} == {
        "README.md": "changed", "adapter_config.json": "changed", "loss.png": "new",
        "adapter_model.safetensors": "same",
    }  # fmt: skip
    unseen = "the Hub shows no me/hidden without a login"
    hidden = push("adapter", "me/hidden", "--dry-run", "--json", HF_TOKEN="")
    assert any(note.startswith(unseen) for note in json.loads(hidden.stdout)["notes"])


DATA = {"files": [{"name": "chat.jsonl", "rows": 3, "sha256": "ab" * 32}], "fingerprint": "cd" * 32}
RECORD = {
    "base": {"fingerprint": "ef" * 32},
    "training": {
        "data": DATA, "held_out_data": DATA, "steps": 3,
        "settings": {"lr": 1e-4, "prompt": ["Who is Ann?"]},
    },
}  # fmt: skip


def test_traces_of_the_data_stay_here_unless_they_are_meant(push, shelf, tmp_path):
    folder = tmp_path / "adapter"
    factors = load_file(folder / "adapter_model.safetensors")
    name, factor = next((n, t) for n, t in factors.items() if n.endswith("lora_A.weight"))
    moment = {
        name.removeprefix("base_model.model.").replace("lora_A.weight", "second_moment"):
        torch.eye(len(factor))
    }  # fmt: skip
    save_file(moment, folder / "activation_statistics.safetensors")
    (folder / "training_record.json").write_text(json.dumps(RECORD))
    result = push("adapter", "me/new")
    assert result.returncode == 0, result.stderr
    assert "activation_statistics.safetensors is not published, because" in result.stdout
    assert "samples are not published; --whole-record publishes them" in result.stdout
    files = published(shelf)
    assert sorted(files) == ["README.md", *PEFT, "training_record.json"]
    for secret in ("ab" * 32, "cd" * 32, "Who is Ann?"):
        assert not any(secret.encode() in data for data in files.values())
    record = json.loads(files["training_record.json"])
    assert record["base"] == RECORD["base"]
    assert record["training"]["data"] == {"files": [{"name": "chat.jsonl", "rows": 3}]}
    assert record["training"]["settings"] == {"lr": 1e-4}
    assert b"| `chat.jsonl` |" in files["README.md"]

    # Both remedies that are named.
    result = push("adapter", "me/new", "--with-statistics", "--whole-record")
    assert "activation_statistics.safetensors is published; it is derived" in result.stdout
    assert "prompts of its samples are published" in result.stdout
    files = published(shelf)
    assert json.loads(files["training_record.json"]) == RECORD
    assert "activation_statistics.safetensors" in files

    # What stays here from now on leaves the Hub.
    assert "removed: activation_statistics.safetensors" in push("adapter", "me/new").stdout
    assert "activation_statistics.safetensors" not in published(shelf)


def test_what_is_excluded_stays_here(push, shelf, tmp_path):
    folder = tmp_path / "adapter"
    (folder / "notes.txt").write_text("mine")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "training_record.json").write_text(json.dumps(RECORD))
    more = ["--include", "*.txt", "--exclude", "notes*", "--exclude", "t*"]
    result = push("adapter", "me/new", *more, "--json")
    assert result.returncode == 0, result.stderr
    left_out = json.loads(result.stdout)["left_out"]
    assert left_out == ["notes.txt", "tokenizer.json", "training_record.json"]
    assert sorted(published(shelf)) == ["README.md", *PEFT]
    refused = push("adapter", "me/new", "--exclude", "adapter_*")
    assert refused.returncode == 2
    assert "--exclude leaves out adapter_config.json, without which the adapter" in refused.stderr
    convert(SMALL_MODEL, tmp_path / "bundle")
    for option in (["--exclude", "*.md"], ["--with-statistics"], ["--whole-record"]):
        assert push("bundle", "me/b", "--base-model", "org/base", *option).returncode == 2


def test_what_is_nobodys_business_stays_here(push, shelf, tmp_path):
    folder = tmp_path / "adapter"
    (folder / "checkpoint-5").mkdir()
    (folder / "checkpoint-5" / "optimizer.pt").write_bytes(b"x")
    (folder / "training_args.bin").write_bytes(b"x")
    (folder / ".env").write_text("SECRET=1")
    (folder / "notes.txt").write_text("mine")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "loss.png").write_bytes(b"png")
    (folder / "base.gguf").write_bytes(b"GGUF, but no adapter")
    record = {"training": {"data": {"file": str(tmp_path / "chat.jsonl")}, "seed": 3}}
    (folder / "training_record.json").write_text(json.dumps(record))
    result = push("adapter", "me/new", "--include", "*.txt", "--json")
    assert result.returncode == 0, result.stderr
    said = json.loads(result.stdout)
    assert said["left_out"] == ["base.gguf", "checkpoint-5/optimizer.pt", "training_args.bin"]
    files = published(shelf)
    assert sorted(files) == ["README.md", *PEFT, "loss.png", "notes.txt", "tokenizer.json",
                             "training_record.json"]  # fmt: skip
    assert json.loads(files["training_record.json"])["training"]["data"] == {"file": "chat.jsonl"}
    assert not any(str(tmp_path).encode() in data for data in files.values())
    assert "| `chat.jsonl` |" in files["README.md"].decode()


def test_a_link_out_of_the_directory_is_refused(push, shelf, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("{}")
    (tmp_path / "adapter" / "tokenizer.json").symlink_to(secret)
    result = push("adapter", "me/new")
    assert result.returncode == 3
    assert "leads out of its directory" in result.stderr
    assert "me/new" not in shelf.repositories


def test_an_adapter_in_a_bundle(push, shelf, tmp_path):
    convert(SMALL_MODEL, tmp_path / "bundle")
    convert(tmp_path / "local", tmp_path / "bundle" / "adapters" / "polite")
    (tmp_path / "bundle" / "adapters" / "polite" / "scratch.png").write_bytes(b"not listed")
    place = "bundle/adapters/polite"
    assert push(place, "me/new").returncode == 3
    result = push(place, "me/new", "--base-model", "org/base", "--with-gguf")
    assert (result.returncode, result.stderr) == (0, "")
    assert sorted(published(shelf)) == ["README.md", *PEFT, "new-lora-f16.gguf"]
    config = json.loads(published(shelf)["adapter_config.json"])
    assert config["base_model_name_or_path"] == "org/base"


def test_a_bundle_of_other_shards_replaces_the_old_ones(push, shelf, tmp_path, model):
    convert(model, tmp_path / "many", max_shard_size=6_000)
    convert(model, tmp_path / "one")
    other = {"extra/other.safetensors": b"somebody's own"}
    for name in ("many", "one"):
        result = push(name, "me/bundle", "--base-model", "org/base")
        assert (result.returncode, result.stderr) == (0, "")
        remote = published(shelf, "me/bundle")
        del remote["README.md"]
        assert remote == files_of(tmp_path / name) | (other if name == "one" else {})
        shelf.repositories["me/bundle"].files.update(other)
    assert "removed: model-00002-of-" in result.stdout


def test_a_damaged_adapter_is_not_published(push, shelf, tmp_path):
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    result = push("adapter", "me/new")
    assert result.returncode == 3
    assert "me/new" not in shelf.repositories


def test_a_pickle_is_not_published(push, shelf, tmp_path):
    folder = tmp_path / "adapter"
    (folder / "adapter_model.safetensors").rename(folder / "activation_statistics.safetensors")
    (folder / "adapter_model.bin").write_bytes(b"a pickle")
    assert push("adapter", "me/new").returncode == 3
    assert "me/new" not in shelf.repositories


def test_what_is_not_published(push, shelf, model):
    result = push(model, "me/new")
    assert result.returncode == 3
    assert "loraformat convert MODEL BUNDLE" in result.stderr
    for repo in ("new", "me/new@v1", "a/b/c", "me/"):
        assert push("adapter", repo).returncode == 2


@pytest.mark.parametrize(
    "option", [("--tag", "a b"), ("--tag", ""), ("--tag", "v1..2"), ("--tag", "-v"),
               ("--revision", "x.lock"), ("--revision", "a" * 40), ("--revision", "/x")],
)  # fmt: skip
def test_names_that_git_does_not_take(push, shelf, option):
    result = push("adapter", "me/new", *option)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {option[0]} ")
    assert result.stderr.count("\n") == 1
    assert shelf.requests == []


def test_quiet(push, shelf):
    result = push("adapter", "me/new", "--quiet")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
