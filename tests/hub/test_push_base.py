"""Publishing: which model on the Hub an adapter or a bundle is said to belong to."""

import json

import pytest

from loraformat.demo import SMALL_MODEL
from tests.hub.conftest import BASE_COMMIT, Repository, files_of, published


def test_a_base_that_is_a_local_path_is_refused_before_anything_is_sent(push, shelf):
    result = push("local", "me/new")
    assert result.returncode == 3
    assert result.stderr == (
        "error: local: names its base small_model, which is not a model on the Hub; give it with "
        "--base-model ORG/NAME\n"
    )
    assert shelf.requests == []


def test_the_base_is_said(push, shelf, tmp_path):
    result = push("local", "me/new", "--base-model", f"org/base@{BASE_COMMIT}", "--json")
    assert result.returncode == 0, result.stderr
    said = json.loads(result.stdout)
    assert said["base_model"] == "org/base"
    config = json.loads(published(shelf)["adapter_config.json"])
    assert config.pop("base_model_name_or_path") == "org/base"
    there = json.loads((tmp_path / "local" / "adapter_config.json").read_bytes())
    assert there.pop("base_model_name_or_path") == "small_model"
    assert config == there
    assert BASE_COMMIT in published(shelf)["README.md"].decode()


def test_a_name_that_is_also_a_local_directory_is_no_hub_id(push, shelf, tmp_path):
    (tmp_path / "org" / "base").mkdir(parents=True)
    assert push("adapter", "me/new").returncode == 3


def test_a_base_that_is_not_on_the_hub(push, shelf):
    result = push("local", "me/new", "--base-model", "org/typo")
    assert result.returncode == 7
    assert result.stderr.startswith("error: base model org/typo: is not a repository on the Hub; ")
    assert "me/new" not in shelf.repositories


@pytest.mark.parametrize("revision", ["main", BASE_COMMIT])
def test_the_card_names_the_commit_of_the_base(push, shelf, revision):
    assert push("local", "me/new", "--base-model", f"org/base@{revision}").returncode == 0
    card = published(shelf)["README.md"].decode()
    assert f"| revision of the base | `{BASE_COMMIT}` |" in card
    assert f'revision = "{BASE_COMMIT}"' in card
    assert f"loraformat convert org/base@{BASE_COMMIT} base.gguf" in card


def test_a_revision_that_the_base_does_not_have(push, shelf):
    result = push("local", "me/new", "--base-model", "org/base@typo")
    assert result.returncode == 7
    assert result.stderr.startswith("error: base model org/base@typo: has no such revision; ")
    assert "me/new" not in shelf.repositories


def test_a_base_that_is_a_path(push, shelf):
    result = push("local", "me/new", "--base-model", "./base")
    assert result.returncode == 2
    assert "--base-model ./base: wanted ORG/NAME" in result.stderr
    assert shelf.requests == []


def test_a_bundle_from_the_hub_says_which_model_it_is(push, ask, shelf):
    """With its commit; and so do its adapters, there and written anew."""
    shelf.repositories["org/base"] = Repository(files_of(SMALL_MODEL), BASE_COMMIT)
    assert ask("convert", "org/base", "bundle").returncode == 0
    assert ask("convert", "local", "bundle/adapters/polite").returncode == 0
    assert ask("convert", "bundle/adapters/polite", "anew", "--canonical").returncode == 0
    for number, path in enumerate(("bundle", "bundle/adapters/polite", "anew")):
        result = push(path, f"me/{number}", "--json")
        assert result.returncode == 0, result.stderr
        assert json.loads(result.stdout)["base_model"] == "org/base"
        card = published(shelf, f"me/{number}")["README.md"].decode()
        assert f"| revision of the base | `{BASE_COMMIT}` |" in card
