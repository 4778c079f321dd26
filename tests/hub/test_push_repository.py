"""Publishing: branches, pull requests, tags, and what others do meanwhile."""

from tests.hub.conftest import published


def test_a_branch(push, shelf):
    assert push("adapter", "me/new").returncode == 0
    main = shelf.repositories["me/new"].commit
    result = push("adapter", "me/new", "--revision", "next", "--license", "mit")
    assert result.returncode == 0, result.stderr
    repository = shelf.repositories["me/new"]
    assert repository.commit == main
    assert repository.branches["next"] != main
    assert push("adapter", "me/new", "--revision", "same").returncode == 0
    assert repository.branches["same"] == main


def test_a_pull_request(push, shelf):
    assert push("adapter", "me/new", "--create-pr").returncode == 7
    assert push("adapter", "me/new").returncode == 0
    main = shelf.repositories["me/new"].commit
    shelf.read_only.add("me/new")
    result = push("adapter", "me/new", "--license", "mit", "--create-pr")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.rstrip().endswith(f"{shelf.endpoint}/me/new/discussions/1")
    repository = shelf.repositories["me/new"]
    assert repository.commit == main
    assert b"license: mit" in repository.commits[repository.pulls["refs/pr/1"]]["README.md"]
    assert push("adapter", "me/new", "--create-pr", "--tag", "v1").returncode == 2


def test_private(push, shelf):
    assert push("adapter", "me/new", "--private").returncode == 0
    assert shelf.repositories["me/new"].private
    assert push("adapter", "me/new", "--private").returncode == 0
    shelf.repositories["me/new"].private = False
    result = push("adapter", "me/new", "--private", "--license", "mit")
    assert result.returncode == 7
    assert "exists and is public" in result.stderr


def test_a_tag_is_never_moved(push, shelf):
    assert push("adapter", "me/new", "--tag", "v1").returncode == 0
    repository = shelf.repositories["me/new"]
    commit = repository.commit
    result = push("adapter", "me/new", "--tag", "v1", "--license", "mit")
    assert result.returncode == 7
    assert "has a tag v1 already" in result.stderr
    assert (repository.commit, repository.tags) == (commit, {"v1": commit})


def test_somebody_else_was_faster(push, shelf):
    assert push("adapter", "me/new").returncode == 0

    def change(repository):
        shelf.meanwhile = None
        files = {**repository.files, "x": b""}
        repository.branches["main"] = repository.add_commit("main", repository.commit, files, "x")

    shelf.meanwhile = change
    result = push("adapter", "me/new", "--license", "mit")
    assert result.returncode == 7
    assert result.stderr == (
        "error: me/new: was changed by someone else in the meantime; run again; it starts from "
        "the new state\n"
    )
    assert b"license: mit" not in published(shelf)["README.md"]
    assert push("adapter", "me/new", "--license", "mit").returncode == 0
    assert "x" in published(shelf)
    assert b"license: mit" in published(shelf)["README.md"]
