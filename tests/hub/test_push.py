"""Publishing: what appears on the Hub, and that it appears at once."""

import hashlib
import json
import re
import shutil

import pytest

from loraformat.demo import SMALL_MODEL
from loraformat.ops.convert import convert
from loraformat.ops.reduce import Reduction, reduce
from tests.hub.conftest import BASE_COMMIT, Repository, files_of
from tests.hub.fake_hub import TOKEN

PEFT = ["adapter_config.json", "adapter_model.safetensors"]


def published(server, repo="me/new"):
    return {p: d for p, d in server.repositories[repo].files.items() if p != ".gitattributes"}


def writes(server):
    return [path for way, path in server.requests if way == "POST" and "/commit/" in path]


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


def test_pushing_again_changes_nothing(push, shelf):
    assert push("adapter", "me/new", "--tag", "v1.0").returncode == 0
    uploads, commits = shelf.uploads(), len(writes(shelf))
    result = push("adapter", "me/new", "--tag", "v1.0")
    assert result.returncode == 0
    assert "nothing has changed since commit" in result.stdout
    assert (shelf.uploads(), len(writes(shelf))) == (uploads, commits)
    repository = shelf.repositories["me/new"]
    assert repository.tags == {"v1.0": repository.commit}


def test_a_base_that_is_a_local_path_is_refused_before_anything_is_sent(push, shelf):
    result = push("local", "me/new")
    assert result.returncode == 3
    assert result.stderr == (
        "error: local: names its base small_model, which is no model on the Hub; say which model "
        "on the Hub it is with --base-model ORG/NAME\n"
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
    assert f"the Hub was not asked about me/new: {offline}" in said["notes"]
    assert said["commit"] is None
    assert {file["status"] for file in said["files"]} == {"new"}


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


def test_a_card_written_by_hand_stays(push, shelf, tmp_path):
    text = "---\nlicense: mit\nlanguage: de\n---\n# Mein Adapter\n\nMeine Worte.\n"
    (tmp_path / "adapter" / "README.md").write_text(text)
    assert push("adapter", "me/new").returncode == 0
    card = published(shelf)["README.md"].decode()
    assert "license: mit\n" in card
    assert "# Mein Adapter\n\nMeine Worte.\n" in card
    assert (tmp_path / "adapter" / "README.md").read_text() == text


def test_a_card_that_is_no_text(push, shelf, tmp_path):
    (tmp_path / "adapter" / "README.md").write_bytes(b"\xff\xfe")
    result = push("adapter", "me/new")
    assert result.returncode == 3
    assert "README.md: is not UTF-8" in result.stderr
    assert "me/new" not in shelf.repositories


def test_a_card_edited_on_the_hub_stays(push, shelf, tmp_path):
    assert push("adapter", "me/new").returncode == 0
    files = shelf.repositories["me/new"].files
    files["README.md"] = files["README.md"].replace(b"# new\n", b"# new\n\nEdited there.\n")
    assert push("adapter", "me/new", "--license", "mit").returncode == 0
    card = published(shelf)["README.md"].decode()
    assert "Edited there." in card
    assert card.count("loraformat: end of the generated part") == 1
    (tmp_path / "adapter" / "README.md").write_text("# Mine\n")
    result = push("adapter", "me/new")
    assert "note: README.md on the Hub has other words than the one here" in result.stdout
    assert "Edited there." not in published(shelf)["README.md"].decode()
    assert "README.md on the Hub" not in push("adapter", "me/new").stdout


def test_the_licence_is_said(push, shelf):
    assert push("adapter", "me/new", "--license", "cc-by-4.0").returncode == 0
    assert "license: cc-by-4.0\n" in published(shelf)["README.md"].decode()
    result = push("adapter", "me/new", "--license", "my: own\nlicence")
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1


def test_runtimes_that_would_be_wrong_are_named_and_not_offered(push, shelf, tmp_path):
    path = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "use_rslora": True, "r": 24}))
    result = push("adapter", "me/new", "--json")
    assert result.returncode == 0, result.stderr
    (note,) = [note for note in json.loads(result.stdout)["notes"] if "refused" in note]
    assert "sglang (RSLORA_IGNORED), lorax (RANK_NOT_IN_SET)" in note
    assert note.endswith("for the remedy run: loraformat check adapter")
    assert "vllm" not in note  # which heeds rsLoRA
    assert "llama.cpp" not in note  # for which it is converted
    card = published(shelf)["README.md"].decode()
    assert "### vLLM" in card
    assert "### llama.cpp" in card


def test_a_fixed_adapter_is_wrong_nowhere(push, ask, shelf):
    assert ask("check", "adapter", "--fix", "-o", "fixed").returncode == 0
    result = push("fixed", "me/new")
    assert result.returncode == 0, result.stderr
    assert "refused" not in result.stdout


def test_the_facts_on_a_card_do_not_outlive_the_weights(push, ask, shelf, tmp_path):
    (tmp_path / "adapter" / "README.md").write_text("# Mine\n\nWords.\n")
    assert push("adapter", "me/new").returncode == 0
    assert ask("pull", "me/new", "back", HF_TOKEN=TOKEN).returncode == 0
    assert "| rank | 24 |" in (tmp_path / "back" / "README.md").read_text()
    for verb in (("convert", "back", "copy"), ("reduce", "back", "-o", "reduced", "--rank", "8"),
                 ("check", "back", "--fix", "-o", "fixed")):  # fmt: skip
        assert ask(*verb).returncode == 0, verb
    copied, reduced, fixed = (
        (tmp_path / name / "README.md").read_text() for name in ("copy", "reduced", "fixed")
    )
    assert copied == (tmp_path / "back" / "README.md").read_text()
    for card in (reduced, fixed):
        assert card.startswith("---\nbase_model: org/base\n")
        assert card.endswith("# Mine\n\nWords.\n\n")
    assert push("reduced", "me/new").returncode == 0
    card = published(shelf)["README.md"].decode()
    assert "| rank | 8 |" in card
    assert "Words." in card


@pytest.mark.parametrize(
    "verb", [("reduce", "adapter", "-o", "new", "--rank", "8"),
             ("combine", "adapter", "local", "-o", "new", "--method", "linear")],
)  # fmt: skip
def test_what_was_measured_of_others_is_no_evaluation(push, ask, shelf, tmp_path, verb):
    for name in ("adapter", "local"):
        record = {"evaluation": {"before": {"loss": 2.5}, "after": {"loss": 1.5}}, "seed": name}
        (tmp_path / name / "training_record.json").write_text(json.dumps(record))
        (tmp_path / name / "loss.png").write_bytes(b"png")
    assert push("adapter", "me/old").returncode == 0
    assert "## Evaluation" in published(shelf, "me/old")["README.md"].decode()
    assert ask(*verb).returncode == 0
    assert push("new", "me/new", "--base-model", "org/base").returncode == 0
    files = published(shelf)
    card = files["README.md"].decode()
    assert "## Evaluation" not in card
    assert "loss.png" not in files
    records = json.loads(files["training_record.json"])["derived_from"]
    assert [record["seed"] for record in records] == ["adapter", "local"][: len(records)]
    assert len(records) == (2 if verb[0] == "combine" else 1)
    assert '"seed": "adapter"' in card  # in the fold


@pytest.mark.parametrize(("record", "shown"), [({"training": {"steps": 3}}, True), ({}, False)])
def test_the_loss_curve_of_the_run(push, shelf, tmp_path, record, shown):
    (tmp_path / "adapter.run").mkdir()
    (tmp_path / "adapter.run" / "loss.png").write_bytes(b"png")
    (tmp_path / "adapter.run" / "metrics.jsonl").write_text("{}")
    (tmp_path / "adapter" / "training_record.json").write_text(json.dumps(record))
    result = push("adapter", "me/new")
    assert result.returncode == 0, result.stderr
    files = published(shelf)
    assert ("loss.png" in files) == shown
    assert ("![Loss curve](loss.png)" in files["README.md"].decode()) == shown
    assert "metrics.jsonl" not in files


def test_what_vllm_refuses_is_not_on_the_card(push, shelf, tmp_path):
    path = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "bias": "lora_only"}))
    assert push("adapter", "me/new").returncode == 0
    card = published(shelf)["README.md"].decode()
    assert "### transformers and PEFT" in card
    assert "### vLLM" not in card


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
    assert "nothing has changed" in push("adapter", "me/new", "--with-gguf").stdout


def config_only(tmp_path):
    shutil.copytree(
        SMALL_MODEL, tmp_path / "config-only", ignore=shutil.ignore_patterns("*.safetensors")
    )
    return tmp_path / "config-only"


def test_a_stale_gguf_of_other_weights_leaves(push, shelf, tmp_path):
    assert push("adapter", "me/new", "--with-gguf").returncode == 0
    shelf.repositories["me/new"].files["model-q8_0.gguf"] = b"somebody's own"
    reduce(tmp_path / "adapter", tmp_path / "smaller", Reduction(rank=8))
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
    assert push("adapter", "me/new", "--base", model).returncode == 2
    for repo in ("new", "me/new@v1", "a/b/c", "me/"):
        assert push("adapter", repo).returncode == 2


# The state of the repository


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
        "error: me/new: was changed by somebody else meanwhile; run again: it starts from the new "
        "state\n"
    )
    assert b"license: mit" not in published(shelf)["README.md"]
    assert push("adapter", "me/new", "--license", "mit").returncode == 0
    assert "x" in published(shelf)
    assert b"license: mit" in published(shelf)["README.md"]


# Failures


def test_nobody_is_logged_in(push, shelf):
    result = push("adapter", "me/new", HF_TOKEN="")
    assert result.returncode == 7
    assert result.stderr == ("error: nobody is logged in on this machine; run: hf auth login\n")
    assert shelf.requests == []


def test_a_token_that_is_not_accepted(push, shelf):
    result = push("adapter", "me/new", HF_TOKEN="hf_wrong")
    assert result.returncode == 7
    assert result.stderr == (
        "error: me/new: the Hub does not accept the token; run: hf auth login\n"
    )


def test_a_token_that_may_not_write(push, shelf):
    shelf.read_only.add("other")
    result = push("adapter", "other/new")
    assert result.returncode == 7
    assert result.stderr.startswith("error: other/new: the token may not do this; use one with")


def test_the_token_is_never_shown_or_kept(push, shelf, tmp_path):
    shelf.broken_uploads = 99
    for more in (["--json"], [], ["--dry-run"]):
        result = push("adapter", "me/new", *more)
        assert TOKEN not in result.stdout + result.stderr
    assert not any(TOKEN.encode() in data for data in files_of(tmp_path).values())


def test_an_interrupted_upload_goes_on(push, ask, shelf, tmp_path, model):
    convert(model, tmp_path / "bundle", shard_limit=6_000)
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


def test_a_bundle_of_other_shards_replaces_the_old_ones(push, shelf, tmp_path, model):
    convert(model, tmp_path / "many", shard_limit=6_000)
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


def test_what_the_hub_kept_wrong_is_found(push, shelf):
    shelf.stored_wrong.add("adapter_model.safetensors")
    result = push("adapter", "me/new", "--tag", "v1")
    assert result.returncode == 7
    assert "does not hold what was sent: adapter_model.safetensors" in result.stderr
    assert shelf.repositories["me/new"].tags == {}


def test_front_matter_written_by_hand(push, shelf, tmp_path):
    (tmp_path / "adapter" / "README.md").write_text("---\nbase_model: /x\n---\nX\n")
    assert push("adapter", "me/new").returncode == 0
    (tmp_path / "adapter" / "README.md").write_text("---\nlicense: [\n---\nX\n")
    result = push("adapter", "me/new")
    assert result.returncode == 3
    assert "front matter is not a YAML mapping" in result.stderr


@pytest.mark.parametrize("status", [500, 429])
def test_a_hub_out_of_order(push, shelf, status):
    shelf.failing = status
    result = push("adapter", "me/new")
    assert result.returncode == 7
    assert re.fullmatch(r"error: [^\n]*HTTP status \d+[^\n]*\n", result.stderr)


def test_quiet(push, shelf):
    result = push("adapter", "me/new", "--quiet")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
