"""Cards of adapters and bundles: what they say, what they leave out, and where it stands."""

import re
from dataclasses import replace

import pytest
import yaml

from loraformat.card import (
    AdapterFacts,
    Base,
    BundleFacts,
    FileFact,
    Licence,
    adapter_card,
    bundle_card,
    is_template,
)
from loraformat.card.document import BEGIN, END
from loraformat.card.training import without_paths
from loraformat.model.description import (
    AdapterInfo,
    AdapterSummary,
    ModelInfo,
    ModuleSummary,
    TensorSummary,
)
from loraformat.runtimes.chat import Chat, ChatFormat

BASE = Base("org/base_model", "b" * 40, Licence("other", "llama3.2", "LICENSE"))
FILES = [FileFact("adapter_model.safetensors", 4096, "a" * 64)]
SAID = AdapterInfo(
    path="polite", format="peft", bytes=4096, base_model="org/base_model", bundle=None, ranks=[16],
    alphas=[32.0], scalings=[2.0], targets=["q_proj"], parameters=12_345, dtypes={"F32": 12_345},
    base_fingerprint="f" * 64, dora=0, biases=0, embeddings=0, replacements=[], replaced_rows=[],
    modules=[ModuleSummary("q_proj", 16, 32.0, 2.0, 64, 64, "F32", 2048, False, False)] * 4,
)  # fmt: skip
ADAPTER = AdapterFacts("me/polite", BASE, SAID, FILES, task="CAUSAL_LM")
TENSORS = [TensorSummary(name, "nf4", "F32", (8, 8), 36, error)
           for name, error in (("a", 0.08), ("b", 0.1))]  # fmt: skip
BUNDLED = ModelInfo(
    path="bundle", format="loraformat", architecture="LlamaForCausalLM", model_type="llama",
    layers=2, parameters=1000, dtypes={"NF4": 1000}, quantized_parameters=900, weight_bytes=600,
    total_bytes=700, bits_per_weight=4.8, quantized_bits_per_weight=4.5, block_sizes=[64],
    double_quant=True, fingerprint="f" * 64, tensors=TENSORS,
    adapters=[AdapterSummary("polite", 12_345, 4096, [16], ["q_proj"], None)],
)  # fmt: skip
BUNDLE = BundleFacts("me/bundle", BASE, BUNDLED, FILES)
RECORD = {
    "training": {
        "data": [{"file": "chat.jsonl", "sha256": "0" * 64, "rows": 1200}],
        "prompt_format": "<|user|>\n{prompt}\n<|assistant|>\n",
        "evaluation": {"held out": {"before": {"loss": 2.5}, "after": {"loss": 1.25}}},
        "seed": 17,
    },
    "versions": {"torch": "2.13.0"},
}


def saying(**changes):
    return replace(ADAPTER, said=replace(SAID, **changes))


def front(text):
    return yaml.safe_load(re.match(r"---\n(.*?)---\n", text, re.S)[1])


def test_front_matter_of_an_adapter():
    fields = front(adapter_card(ADAPTER).render())
    assert fields == {
        "base_model": "org/base_model",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "license": "other",
        "license_name": "llama3.2",
        "license_link": "LICENSE",
        "tags": ["lora", "loraformat", "base_model:adapter:org/base_model", "transformers"],
    }


def test_an_adapter_says_what_it_is():
    text = adapter_card(ADAPTER).render()
    assert "# polite\n" in text
    for fact in ("12,345", "| rank | 16 |", "| alpha | 32 |", "| B A is scaled by | 2 |",
                 "`q_proj` (4 modules)", "b" * 40, "`llama3.2`", "f" * 64, "a" * 64):  # fmt: skip
        assert fact in text, fact
    assert 'PeftModel.from_pretrained(model, "me/polite")' in text
    assert "--max-lora-rank 16 --lora-modules polite=me/polite" in text
    assert "llama-server -m base_model.gguf --lora polite.gguf" in text
    pinned = f"org/base_model@{'b' * 40}"
    assert f"loraformat convert {pinned} base_model.gguf --dtype f16" in text
    assert f"loraformat convert me/polite polite.gguf --base {pinned}" in text
    assert f'revision = "{"b" * 40}"\n' in text
    assert f"vllm serve org/base_model --revision {'b' * 40} --enable-lora" in text
    assert "ADAPTER ./polite.gguf" in text


def test_an_adapter_of_conversations_is_talked_to():
    chat = Chat(ChatFormat("", None, "<u>", "<a>", "<e>"), ("<e>",), (5,))
    plain = adapter_card(ADAPTER).render()
    assert "Once upon a time" in plain and "apply_chat_template" not in plain
    text = adapter_card(replace(ADAPTER, chat=chat)).render()
    assert "Once upon a time" not in text
    assert "tokenizer.apply_chat_template(" in text and "eos_token_id" not in text
    assert "/v1/chat/completions" in text and "stop_token_ids" not in text
    assert "llama-cli -m base_model.gguf --lora polite.gguf -cnv\n" in text
    assert 'TEMPLATE """<u>{{ .Prompt }}<a>{{ .Response }}<e>"""\nPARAMETER stop "<e>"\n' in text
    assert "chat_template.jinja" not in text
    beside = [FileFact(name, 9, "c" * 64) for name in ("chat_template.jinja",
                                                       "generation_config.json")]  # fmt: skip
    own = adapter_card(replace(ADAPTER, files=[*FILES, *beside], chat=chat))
    for words in (
        'cached_file("me/polite", "chat_template.jinja")',
        "eos_token_id=[5]",
        '"stop_token_ids": [5]',
        "hf download me/polite chat_template.jinja --local-dir .\nvllm serve",
        "--chat-template chat_template.jinja",
        "--jinja --chat-template-file chat_template.jinja",
    ):
        assert words in own.render(), words
    # Somebody else's, who says no more than that there is a template.
    text = adapter_card(replace(ADAPTER, files=[*FILES, beside[0]], chat=Chat())).render()
    assert "apply_chat_template" in text and "not put in Ollama's language here" in text


def test_no_empty_sections():
    text = adapter_card(replace(saying(base_fingerprint=None), base=Base("org/base"))).render()
    for absent in (
        "Training data",
        "Evaluation",
        "<details>",
        "licence",
        "revision",
        "fingerprint",
    ):
        assert absent not in text
    heads = re.findall(r"^(#+) (.*)\n\n(?=(#*))", text, flags=re.M)
    assert len(heads) == 8
    assert [title for level, title, after in heads if after] == ["Use"]  # by its subsections


def test_the_gguf_file_has_its_own_name():
    facts = replace(ADAPTER, gguf="polite-lora-f16.gguf")
    text = adapter_card(facts).render()
    assert "hf download me/polite polite-lora-f16.gguf --local-dir ." in text
    assert "--lora polite-lora-f16.gguf" in text
    assert "gguf" in front(text)["tags"]
    alone = adapter_card(replace(facts, peft=False)).render()
    assert front(alone)["library_name"] == "gguf"
    assert "transformers" not in alone


def test_what_no_runtime_takes_is_not_offered():
    wrong = frozenset({"vllm", "llama.cpp", "ollama"})
    text = adapter_card(replace(ADAPTER, wrong_in=wrong)).render()
    assert "PeftModel" in text
    for title in ("vLLM", "llama.cpp", "Ollama"):
        assert title in adapter_card(ADAPTER).render()
        assert title not in text
    assert (
        "PeftModel"
        not in adapter_card(replace(ADAPTER, wrong_in=frozenset(["transformers"]))).render()
    )
    nobody = adapter_card(replace(ADAPTER, wrong_in=wrong | {"transformers"})).render()
    assert "## Use" not in nobody


@pytest.mark.parametrize("record", [RECORD, RECORD["training"]])
def test_training(record):
    text = adapter_card(replace(ADAPTER, training=record)).render()
    assert "| file | sha256 | rows |" in text
    assert "| `chat.jsonl` |" in text
    assert "1,200" in text
    assert "```\n<|user|>\n{prompt}\n<|assistant|>\n```" in text
    assert "| held out, loss | 2.5 | 1.25 |" in text
    assert "<details>" in text
    assert '"seed": 17' in text


@pytest.mark.parametrize(
    ("evaluation", "row"),
    [
        ({"before": 3.0, "after": 2.0}, "|  | 3 | 2 |"),
        (
            {"before": {"loss": 3, "perplexity": 20}, "after": {"loss": 2}},
            "| perplexity | 20 | - |",
        ),
        ({"a": {"before": {"loss": float("nan")}, "after": {"loss": 2}}}, "| a, loss | - | 2 |"),
    ],
)
def test_evaluation(evaluation, row):
    text = adapter_card(replace(ADAPTER, training={"evaluation": evaluation})).render()
    assert row in text


def test_what_the_trainer_writes():
    data = {
        "files": [{"name": "chat.jsonl", "rows": 12, "sha256": "0" * 64}],
        "rows": 12, "trained_tokens": 3456, "fingerprint": "ab",
    }  # fmt: skip
    told = {"data": data, "heldout_before": 2.0, "heldout_after": 1.5, "settings": {"lr": 1e-4}}
    facts = replace(ADAPTER, training={"training": told, "lora": {"rank": 16}})
    text = adapter_card(facts).render()
    assert "| name | rows | sha256 |" in text
    assert "trained tokens: 3,456" in text
    assert "| held\\-out data, loss | 2 | 1.5 |" in text
    assert "| held\\-out data, perplexity | 7.38906 | 4.48169 |" in text
    assert '"lr": 0.0001' in text
    told["heldout_after"] = None
    assert "## Evaluation" not in adapter_card(facts).render()


def test_the_loss_curve_is_shown():
    facts = replace(ADAPTER, files=[*FILES, FileFact("loss.png", 1, "0" * 64)])
    assert "![Loss curve](loss.png)" in adapter_card(facts).render()
    assert "![" not in adapter_card(ADAPTER).render()


def test_loss_alone_is_an_evaluation():
    told = {"training": {"loss": {"before": 3.25, "after": 2.5}}}
    text = adapter_card(replace(ADAPTER, training=told)).render()
    assert "| loss | 3.25 | 2.5 |" in text


@pytest.mark.parametrize("rubbish", [None, 3, "x", [], [[]], {}, {"before": []}, [None, {"a": {}}]])
def test_a_record_of_another_form_is_left_out(rubbish):
    record = {"data": rubbish, "evaluation": rubbish, "prompt_format": [rubbish], "loss": rubbish}
    text = adapter_card(replace(ADAPTER, training=record)).render()
    assert "## Evaluation" not in text
    assert "## Training data" not in text


def test_hostile_names_stay_in_their_cells():
    evil = "q|x\n\n# Pwned <script>alert(1)</script> ![](http://e/p.png) `"
    record = {"data": [{evil: evil}], "evaluation": {evil: {"before": {evil: 1}}}}
    said = replace(SAID, targets=[evil], replacements=[evil], dtypes={"F32": 1})
    facts = replace(ADAPTER, said=said, training=record, files=[FileFact(evil, 1, "0" * 64)])
    text = adapter_card(facts).render()
    outside = re.sub(r"^```.*?^```$", "", text, flags=re.S | re.M)
    assert "<script>" not in outside
    assert "![](" not in outside
    assert not re.search(r"^# Pwned", outside, re.M)
    for line in outside.splitlines():
        if "Pwned" in line:
            assert not re.search(r"(?<!\\)`", re.sub(r"`[\w.\-/ ]+`", "", line))


def test_absolute_paths_are_nobodys_matter():
    record = {"a": "/home/me/x.jsonl", "b": ["C:\\Users\\me\\y.csv", "~/z"], "c": "and/or", "d": 1}
    assert without_paths(record) == {"a": "x.jsonl", "b": ["y.csv", "z"], "c": "and/or", "d": 1}


def test_a_bundle():
    text = bundle_card(BUNDLE).render()
    fields = front(text)
    assert fields["base_model_relation"] == "quantized"
    assert fields["library_name"] == "transformers"
    assert {"loraformat", "nf4", "bitsandbytes"} <= set(fields["tags"])
    for fact in ("0.0800 to 0.1000", "double quantization", "| `polite` | 16 | `q_proj` |",
                 "pull me/bundle bundle", "merge bundle bundle/adapters/polite"):  # fmt: skip
        assert fact in text, fact


# What people wrote


def test_what_people_wrote_stays():
    written = "---\nlicense: mit\ntags:\n- mine\n---\n# My adapter\n\nMy words.\n"
    text = adapter_card(ADAPTER).render(written)
    fields = front(text)
    assert fields["license"] == "mit"
    assert "license_name" not in fields
    assert fields["tags"][0] == "mine"
    assert "loraformat" in fields["tags"]
    head, _, rest = text.partition(BEGIN)
    assert head.endswith("# My adapter\n\nMy words.\n\n")
    assert "# polite\n" not in text
    assert END in rest


def test_the_generated_part_is_replaced_where_it_stands():
    first = adapter_card(ADAPTER).render("# Mine\n\nbefore\n") + "\nafter\n"
    second = adapter_card(saying(ranks=[8])).render(first)
    assert second.count(BEGIN) == second.count(END) == 1
    assert "| rank | 8 |" in second
    assert "| rank | 16 |" not in second
    assert second.index("before") < second.index(BEGIN) < second.index(END) < second.index("after")
    assert adapter_card(saying(ranks=[8])).render(second) == second


def test_a_backslash_in_the_new_part_is_no_group_reference():
    facts = saying(targets=["\\1 \\g<0>"])
    once = adapter_card(facts).render()
    assert adapter_card(facts).render(once) == once


def test_the_base_that_the_files_name_wins():
    text = adapter_card(ADAPTER).render("---\nbase_model: /home/me/base\n---\nX\n")
    assert front(text)["base_model"] == "org/base_model"
    assert "/home/me" not in text


def test_a_bundle_comes_before_the_card_of_its_base():
    text = bundle_card(BUNDLE).render("---\nlanguage: en\n---\n# The base\n\nIts words.\n")
    assert text.index("# bundle\n") < text.index(END) < text.index("# The base\n\nIts words.")
    assert front(text)["language"] == "en"
    assert bundle_card(BUNDLE).render(text) == text


def test_the_form_of_peft_is_no_text():
    from huggingface_hub import ModelCard, ModelCardData

    form = ModelCard.from_template(ModelCardData(license="mit", base_model="x/y"), model_id="z")
    assert is_template(str(form))
    text = adapter_card(ADAPTER).render(str(form))
    assert "More Information Needed" not in text
    assert front(text)["license"] == "mit"
    assert not is_template("# Mine\n\n[More Information Needed]\n")
