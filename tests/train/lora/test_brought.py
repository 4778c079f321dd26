"""Adapters that bring whole tensors or another vocabulary: computed with, and trained on."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from loraformat.ops.convert.convert import convert
from loraformat.ops.merge.merge import merge
from loraformat.train import load
from loraformat.train.batch import Batch
from tests.adapters.vocabularies import FORMS, IDS, ROWS, adapter, logits, opened

MODELS = ("llama", "llama tied", "gpt2")


def in_peft(base, path, rows):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.resize_token_embeddings(rows)
    return logits(PeftModel.from_pretrained(model, path))


def apart(one, other):
    return (one - other).abs().max().item() if one.shape == other.shape else float("inf")


def made(folder, model, form, rows):
    """A bundle, its values as a dense model, and an adapter of another vocabulary."""
    adapter(model, form, rows, folder)
    convert(folder / "base", folder / "bundle")
    convert(folder / "bundle", folder / "plain", to_format="safetensors", dtype="f32")
    return folder / "bundle", folder / "adapter"


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    "form", [f for f in FORMS if f not in ("head to save", "tokens as a list")]
)
def test_logits_are_those_of_peft(tmp_path, model, form):
    rows = ROWS - 4 if form == "modules_to_save" else ROWS + 4
    bundle, path = made(tmp_path, model, form, rows)
    wanted = in_peft(tmp_path / "plain", path, rows)
    with load(bundle, adapter=path) as found, torch.no_grad():
        values = found.eval()(input_ids=IDS).logits.double()
    lost = (model, form) == ("llama", "embedding targeted")  # PEFT did not save the head's rows
    assert apart(values, wanted) < (1e-3 if lost else 1e-4)


def test_training_goes_on_and_keeps_what_was_brought(tmp_path):
    """Deltas learn; the embedding, its rows and the tokenizer come out as they went in."""
    bundle, path = made(tmp_path, "llama", "tokens", ROWS + 4)
    (path / "tokenizer.json").write_text('"its own"')
    ids = torch.cat([IDS[:, :8], torch.tensor([[ROWS + 1, ROWS + 3]]).repeat(2, 1)], 1)
    ones, samples = torch.ones_like(ids), ((0,), (1,))
    batch = Batch(ids, ids.clone(), torch.arange(10).repeat(2, 1), ones, samples)
    with load(bundle, adapter=path) as model:
        assert model.tokenizer_directory == path
        before = model.loss(batch)
        before.backward()
        with torch.no_grad():
            for parameter in model.trainable().values():
                assert parameter.grad is not None
                parameter -= 0.01 * parameter.grad
        after = model.loss(batch).item()
        model.save_adapter(tmp_path / "more")
        with torch.no_grad():
            trained = model.eval()(input_ids=IDS).logits.double()
    assert after < before.item()
    assert apart(in_peft(tmp_path / "plain", tmp_path / "more", ROWS + 4), trained) < 1e-4
    assert (tmp_path / "more" / "tokenizer.json").read_text() == '"its own"'
    merge(tmp_path / "plain", [tmp_path / "more"], tmp_path / "merged")
    assert apart(logits(opened(tmp_path / "merged")), trained) < 1e-4


def test_new_tokens_are_generated(tmp_path):
    bundle, path = made(tmp_path, "llama", "modules_to_save", ROWS + 4)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    base.resize_token_embeddings(ROWS + 4)
    theirs = PeftModel.from_pretrained(base, path).eval()
    prompt = torch.tensor([[3, ROWS + 1, ROWS + 2]])
    with load(bundle, adapter=path) as model:
        options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        found = model.generate(prompt, **options)
        assert found.tolist() == theirs.generate(input_ids=prompt, **options).tolist()


def test_a_replaced_norm_is_computed_with(tmp_path):
    FORMS["norm"] = {"modules_to_save": ["norm"]}
    try:
        bundle, path = made(tmp_path, "llama", "norm", ROWS)
    finally:
        del FORMS["norm"]
    wanted = in_peft(tmp_path / "plain", path, ROWS)
    with load(bundle, adapter=path) as model, torch.no_grad():
        assert apart(model.eval()(input_ids=IDS).logits.double(), wanted) < 1e-4
