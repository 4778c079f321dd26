"""aLoRA: what llama.cpp does with our file, against PEFT, and where the two differ.

The differences are llama.cpp's (build 11549): if a later one mends them, these tests say so.
"""

from __future__ import annotations

import peft
import pytest
import torch
from bases import apart, make_base
from llama_runtime import RuntimeFailure, log_probabilities
from loraformat_converters.gguf.container.reader import open_gguf
from transformers import AutoModelForCausalLM

from loraformat.ops.convert.convert import convert

INVOCATION = [100, 101]
SAME, OTHER = 1e-5, 1e-2


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base, its GGUF file, an aLoRA and a plain LoRA in both forms."""
    folder = tmp_path_factory.mktemp("alora")
    make_base("llama", folder / "base")
    convert(folder / "base", folder / "base.gguf", dtype="f32")
    for name, tokens in (("alora", INVOCATION), ("other", [200]), ("plain", None)):
        torch.manual_seed(len(name))
        config = peft.LoraConfig(
            r=4, lora_alpha=6, task_type="CAUSAL_LM", target_modules="all-linear",
            alora_invocation_tokens=tokens,
        )  # fmt: skip
        model = peft.get_peft_model(base_model(folder), config)
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                torch.nn.init.normal_(parameter, std=0.05)
        model.save_pretrained(folder / name)
        convert(folder / name, folder / f"{name}.gguf", base=folder / "base")
    return folder


def base_model(folder):
    return AutoModelForCausalLM.from_pretrained(
        folder / "base", dtype=torch.float32, attn_implementation="eager"
    ).eval()


@pytest.fixture(scope="module")
def by_peft(made):
    """Return a function: log-probabilities of PEFT, with the deltas on the last `acting` tokens."""
    model = peft.PeftModel.from_pretrained(base_model(made), made / "alora").eval()

    def ask(prompt, **acting):
        offsets = {"alora_offsets": [acting["acting"]]} if acting else {}
        with torch.no_grad():
            logits = model(torch.tensor([prompt]), **offsets).logits[0, -1]
        return logits.double().log_softmax(-1).numpy()

    return ask


def by_llama_cpp(made, prompt, *names):
    adapters = [(made / f"{name}.gguf", 1.0) for name in names]
    return log_probabilities(made / "base.gguf", [prompt], adapters)[0]


def differ(one, other):
    return apart([one], [other])


def test_the_tokens_are_carried_there_and_back(made, tmp_path):
    with open_gguf(made / "alora.gguf") as file:
        assert file.array("adapter.alora.invocation_tokens") == INVOCATION
    convert(made / "alora.gguf", tmp_path / "back", base=made / "base")
    assert peft.PeftConfig.from_pretrained(tmp_path / "back").alora_invocation_tokens == INVOCATION


@pytest.mark.parametrize("prompt", [[5, 6, 7, 8, 9, 10], [5, 6, 101, 100, 9, 10]])
def test_without_its_tokens_it_does_nothing(made, by_peft, prompt):
    found = by_llama_cpp(made, prompt, "alora")
    assert differ(found, by_llama_cpp(made, prompt)) == 0
    assert differ(found, by_peft(prompt)) < SAME


def test_a_prompt_that_begins_with_its_tokens_is_as_in_peft(made, by_peft):
    prompt = [*INVOCATION, 9, 10, 11]
    found = by_llama_cpp(made, prompt, "alora")
    assert differ(found, by_peft(prompt)) < SAME
    assert differ(found, by_llama_cpp(made, prompt)) > OTHER


@pytest.mark.parametrize(
    "prompt",
    [[5, 6, *INVOCATION, 9, 10], [9, 10, 11, *INVOCATION], [5, *INVOCATION, 7, *INVOCATION, 8]],
    ids=["within", "at the end", "twice"],
)
def test_after_other_tokens_it_acts_one_token_early(made, by_peft, prompt):
    last = max(n for n in range(len(prompt)) if prompt[n : n + 2] == INVOCATION)
    acting = len(prompt) - last
    assert differ(by_peft(prompt), by_peft(prompt, acting=acting)) == 0, "as PEFT counts itself"
    found = by_llama_cpp(made, prompt, "alora")
    assert differ(found, by_peft(prompt, acting=acting + 1)) < SAME
    assert differ(found, by_peft(prompt)) > OTHER


def test_its_last_token_right_after_it_hides_it_from_llama_cpp(made, by_peft):
    prompt = [5, *INVOCATION, INVOCATION[-1], 7]
    found = by_llama_cpp(made, prompt, "alora")
    assert differ(found, by_llama_cpp(made, prompt)) == 0
    assert differ(by_peft(prompt), found) > OTHER, "PEFT finds it"


def test_beside_a_plain_adapter_it_acts_everywhere(made):
    prompt = [5, 6, 7, *INVOCATION, 9, 10]
    model = peft.PeftModel.from_pretrained(base_model(made), made / "alora")
    model.load_adapter(made / "plain", "plain")
    model.base_model.set_adapter(["default", "plain"])
    with torch.no_grad():
        logits = model.eval()(torch.tensor([prompt]), alora_offsets=[len(prompt)]).logits[0, -1]
    wanted = logits.double().log_softmax(-1).numpy()
    assert differ(by_llama_cpp(made, prompt, "alora", "plain"), wanted) < SAME


def test_two_at_a_time_are_refused_by_llama_cpp(made):
    with pytest.raises(RuntimeFailure, match="multiple aLoRAs"):
        by_llama_cpp(made, [5, 6, *INVOCATION, 200], "alora", "other")


def test_the_conversion_says_where_they_differ(made, tmp_path):
    report = convert(made / "alora", tmp_path / "lora.gguf", base=made / "base")
    assert any("one token before" in note for note in report.notes)
    report = convert(made / "plain", tmp_path / "plain.gguf", base=made / "base")
    assert not any("aLoRA" in note for note in report.notes)
