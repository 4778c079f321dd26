"""Publishing: when nobody is logged in, the Hub is out of order, or the line is cut."""

import re

import pytest

from loraformat.ops.convert.convert import convert
from tests.hub.conftest import TOKEN, files_of, published


def test_nobody_is_logged_in(push, shelf):
    result = push("adapter", "me/new", HF_TOKEN="")
    assert result.returncode == 7
    assert result.stderr == ("error: not logged in on this machine; run: hf auth login\n")
    assert shelf.requests == []


def test_a_token_that_is_not_accepted(push, shelf):
    result = push("adapter", "me/new", HF_TOKEN="hf_wrong")
    assert result.returncode == 7
    assert result.stderr == ("error: me/new: the Hub rejects the token; run: hf auth login\n")


def test_a_token_that_may_not_write(push, shelf):
    shelf.read_only.add("other")
    result = push("adapter", "other/new")
    assert result.returncode == 7
    assert result.stderr.startswith(
        "error: other/new: the token lacks permission for this; use a token with"
    )


def test_the_token_is_never_shown_or_kept(push, shelf, tmp_path):
    shelf.broken_uploads = 99
    for more in (["--json"], [], ["--dry-run"]):
        result = push("adapter", "me/new", *more)
        assert TOKEN not in result.stdout + result.stderr
    assert not any(TOKEN.encode() in data for data in files_of(tmp_path).values())


def test_an_interrupted_upload_goes_on(push, ask, shelf, tmp_path, model):
    convert(model, tmp_path / "bundle", max_shard_size=6_000)
    shelf.broken_uploads = 1
    arguments = ("bundle", "me/bundle", "--base-model", "org/base")
    result = push(*arguments)
    assert result.returncode == 7
    assert result.stderr.count("\n") == 1
    assert list(shelf.repositories["me/bundle"].files) == [".gitattributes"]
    arrived = len(shelf.objects)
    sent = shelf.uploads()
    assert push(*arguments, "--include", "*.txt").returncode == 2
    assert push(*arguments, "--with-gguf").returncode == 2
    result = push(*arguments)
    assert (result.returncode, result.stderr) == (0, "")
    shards = [name for name in published(shelf, "me/bundle") if name.endswith(".safetensors")]
    assert len(shards) > 2
    assert shelf.uploads() - sent == len(shards) - arrived
    local = {**files_of(tmp_path / "bundle")}
    remote = published(shelf, "me/bundle")
    card = remote.pop("README.md")
    assert remote == local
    assert b"base_model_relation: quantized" in card
    assert len(shelf.repositories["me/bundle"].log) == 1
    assert ask("pull", "me/bundle", "back").returncode == 0
    assert files_of(tmp_path / "back") == local | {"README.md": card}
    assert ask("verify", "back").returncode == 0


def test_what_the_hub_kept_wrong_is_found(push, shelf):
    shelf.stored_wrong.add("adapter_model.safetensors")
    result = push("adapter", "me/new", "--tag", "v1")
    assert result.returncode == 7
    assert "does not match the uploaded files: adapter_model.safetensors" in result.stderr
    assert shelf.repositories["me/new"].tags == {}


@pytest.mark.parametrize("status", [500, 429])
def test_a_hub_out_of_order(push, shelf, status):
    shelf.failing = status
    result = push("adapter", "me/new")
    assert result.returncode == 7
    assert re.fullmatch(r"error: [^\n]*HTTP status \d+[^\n]*\n", result.stderr)
