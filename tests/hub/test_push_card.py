"""Publishing: the card, the words that people wrote on it, and the facts that must hold."""

import json

import pytest

from tests.hub.conftest import TOKEN, published


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
    assert "note: README.md on the Hub differs and is replaced" in result.stdout
    assert "Edited there." not in published(shelf)["README.md"].decode()
    assert "README.md on the Hub" not in push("adapter", "me/new").stdout


def test_front_matter_written_by_hand(push, shelf, tmp_path):
    (tmp_path / "adapter" / "README.md").write_text("---\nbase_model: /x\n---\nX\n")
    assert push("adapter", "me/new").returncode == 0
    (tmp_path / "adapter" / "README.md").write_text("---\nlicense: [\n---\nX\n")
    result = push("adapter", "me/new")
    assert result.returncode == 3
    assert "front matter is not a YAML mapping" in result.stderr


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
    (note,) = [note for note in json.loads(result.stdout)["notes"] if "rejected" in note]
    assert "sglang (RSLORA_IGNORED), lorax (RANK_NOT_IN_SET)" in note
    assert note.endswith("to fix this, run: loraformat check adapter")
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


def test_what_vllm_refuses_is_not_on_the_card(push, shelf, tmp_path):
    path = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "bias": "lora_only"}))
    assert push("adapter", "me/new").returncode == 0
    card = published(shelf)["README.md"].decode()
    assert "### transformers and PEFT" in card
    assert "### vLLM" not in card


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


def test_the_card_of_an_adapter_of_conversations_talks_to_it(push, shelf, tmp_path):
    folder = tmp_path / "adapter"
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    text = push("adapter", "me/new", "--dry-run").stdout
    assert "Once upon a time" not in text and "apply_chat_template" in text
    assert '{{ .Prompt }}<|end|><|assistant|>{{ .Response }}<|end|>"""' in text
    assert 'PARAMETER stop "<|end|>"' in text
    hidden = push("adapter", "me/new", "--dry-run", "--exclude", "chat_template.jinja").stdout
    assert "cached_file" in text and "cached_file" not in hidden
