"""Adapters that do not generate: the lines for them compute what their task is, and run."""

from __future__ import annotations

import json
import shutil

import peft
import pytest
import torch
import transformers

from loraformat.card import adapter_card
from loraformat.card.facts import AdapterFacts, Base
from loraformat.demo import ADAPTERS, SMALL_MODEL
from loraformat.ops.check.check import check
from loraformat.ops.check.write import write_usage
from loraformat.ops.info.model import info
from loraformat.runtimes.task_usage import TASK_USAGE

_SIZES = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, pad_token_id=0, vocab_size=len(
        json.loads((SMALL_MODEL / "tokenizer.json").read_bytes())["model"]["vocab"]) + 64,
)  # fmt: skip
#: By task: the class that opens a base, and labels of the head that the adapter brings.
TASKS = {
    "SEQ_CLS": ("AutoModelForSequenceClassification", 3),
    "TOKEN_CLS": ("AutoModelForTokenClassification", 5),
    "QUESTION_ANS": ("AutoModelForQuestionAnswering", None),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "base"
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**_SIZES)).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(SMALL_MODEL / name, folder / name)
    return folder


def trained(base, folder, task):
    """An adapter that PEFT saves; return the model with it."""
    auto, labels = TASKS[task]
    torch.manual_seed(1)
    options = {} if labels is None else {"num_labels": labels}
    model = getattr(transformers, auto).from_pretrained(base, dtype=torch.float32, **options)
    if (
        labels is None
    ):  # whose layers Llama's class calls otherwise than a checkpoint that generates
        model.save_pretrained(base)
    config = peft.LoraConfig(
        task_type=task, r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"],
        init_lora_weights=False,
    )  # fmt: skip
    model = peft.get_peft_model(model, config).eval()
    model.save_pretrained(folder)
    return model


def run(path, *shown):
    """Run a script; return some of its variables."""
    scope: dict = {}
    exec(compile(path.read_text(), str(path), "exec"), scope)
    return [scope[name] for name in shown]


@pytest.mark.parametrize("task", TASKS)
def test_the_files_do_the_task(base, tmp_path, task):
    base = shutil.copytree(base, tmp_path / "base")
    model = trained(base, tmp_path / "adapter", task)
    report = check(tmp_path / "adapter", base=base)
    assert report.facts.labels == TASKS[task][1]
    written = write_usage(report, tmp_path / "run", base=str(base))
    assert written.files == ["run_transformers.py"]
    assert {reason.partition(":")[0] for reason in written.left_out} >= {"mlx", "llama.cpp"}
    assert any(TASK_USAGE[task].does in reason for reason in written.left_out)
    script = tmp_path / "run" / "run_transformers.py"
    (inputs,) = run(script, "inputs")
    with torch.no_grad():
        expected = model(**inputs)
    if task == "QUESTION_ANS":
        (found,) = run(script, "output")
        assert torch.allclose(found.start_logits, expected.start_logits, atol=1e-5)
        return
    name = "logits" if task == "SEQ_CLS" else "labels"
    (found,) = run(script, name)
    if task == "SEQ_CLS":
        assert torch.allclose(found, expected.logits, atol=1e-5) and found.shape == (1, 3)
    else:
        assert found == expected.logits.argmax(-1)[0].tolist()


def test_a_translating_adapter(tmp_path, capsys):
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=_SIZES["vocab_size"], d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4,
        decoder_start_token_id=0,
    )  # fmt: skip
    model = transformers.T5ForConditionalGeneration(config)
    base = tmp_path / "base"
    model.save_pretrained(base)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(SMALL_MODEL / name, base / name)
    lora = peft.LoraConfig(task_type="SEQ_2_SEQ_LM", r=4, target_modules=["q"])
    peft.get_peft_model(model, lora).save_pretrained(tmp_path / "adapter")
    report = check(tmp_path / "adapter", base=base, runtime=["transformers", "mlx"])
    written = write_usage(report, tmp_path / "run", base=str(base))
    assert written.files == ["run_transformers.py"]
    run(tmp_path / "run" / "run_transformers.py")
    assert "AutoModelForSeq2SeqLM" in (tmp_path / "run" / "run_transformers.py").read_text()


@pytest.mark.parametrize("task", [*TASK_USAGE, None, "CAUSAL_LM"])
@pytest.mark.parametrize("gguf", [None, "lora.gguf"])
def test_a_card_shows_the_lines_of_its_task(task, gguf):
    facts = AdapterFacts(
        repo="me/kind", base=Base("org/base"), said=info(ADAPTERS["manual"]), files=[], task=task,
        labels=3, gguf=gguf,
    )  # fmt: skip
    body = adapter_card(facts).body
    generates = task in (None, "CAUSAL_LM")
    assert ("AutoModelForCausalLM" in body) == generates
    assert ("llama-cli" in body) == ("### Ollama" in body) == ("### vLLM" in body) == generates
    assert ("--embeddings" in body) == (task == "FEATURE_EXTRACTION")
    assert ("num_labels=3" in body) == (task in ("SEQ_CLS", "TOKEN_CLS"))
    assert "### transformers and PEFT" in body
