"""train, eval and generate with an adapter that has new tokens, and a tokenizer that knows them."""

import json
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from loraformat.train.run.evaluate import evaluate
from loraformat.train.run.generate import generate
from loraformat.train.run.text_generation import GenerationOptions
from loraformat.train.run.train import train
from tests.train.loop.tiny_runs import make_bundle, options

ROWS = 2050
TURN = "<|turn|>"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A bundle, an adapter with two new tokens, and rows that use one of them."""
    folder = tmp_path_factory.mktemp("tokens")
    bundle = make_bundle(folder)
    base = AutoModelForCausalLM.from_pretrained(folder / "stored")
    base.resize_token_embeddings(ROWS)
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj"], trainable_token_indices=[2048, 2049],
        init_lora_weights=False, task_type="CAUSAL_LM",
    )  # fmt: skip
    peft.get_peft_model(base, config).save_pretrained(folder / "adapter")
    tokenizer = json.loads((bundle / "tokenizer.json").read_text())
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    tokenizer["added_tokens"] += [
        {"id": 2048 + n, "content": text, "special": True, **plain}
        for n, text in enumerate((TURN, "<|other|>"))
    ]
    (folder / "adapter" / "tokenizer.json").write_text(json.dumps(tokenizer))
    shutil.copy(bundle / "tokenizer_config.json", folder / "adapter")
    rows = [{"prompt": f"{TURN} the {n}", "completion": f" bell {TURN}"} for n in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_eval_counts_the_tokens_of_its_own_tokenizer(made):
    adapter = str(made / "adapter")
    found = evaluate(options(made / "bundle", made / "rows.jsonl", made / "none"), [adapter])
    base, own = found.losses[str(made / "bundle")], found.losses[adapter]
    assert own.tokens < base.tokens  # the base spells the new token out
    assert any("its loss is by its own tokens" in note for note in found.notes)


def test_generate_writes_on_from_new_tokens(made, tmp_path):
    run = options(made / "bundle", made / "rows.jsonl", tmp_path / "none",
                  adapter=str(made / "adapter"))  # fmt: skip
    written = generate(run, f"{TURN} the", GenerationOptions(max_tokens=4, temperature=0.0))
    assert written.tokens == 4


def test_train_goes_on_and_writes_the_same_tokens(made, tmp_path):
    run = options(made / "bundle", made / "rows.jsonl", tmp_path / "more",
                  adapter=str(made / "adapter"), dropout=0.0)  # fmt: skip
    train(run)
    before, after = (load_file(path / "adapter_model.safetensors")
                     for path in (made / "adapter", tmp_path / "more"))  # fmt: skip
    kept = [name for name in after if "embed_tokens" in name]
    assert len(kept) == 2 and all(torch.equal(before[name], after[name]) for name in kept)
    factor = next(name for name in after if name.endswith("lora_A.weight"))
    assert not torch.equal(before[factor], after[factor])
    assert (tmp_path / "more" / "tokenizer.json").read_bytes() == (
        made / "adapter" / "tokenizer.json"
    ).read_bytes()
    base = AutoModelForCausalLM.from_pretrained(made / "stored")
    base.resize_token_embeddings(ROWS)
    peft.PeftModel.from_pretrained(base, tmp_path / "more")
