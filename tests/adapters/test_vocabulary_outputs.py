"""Another vocabulary in every output: dense, bundles with codes or beside them, bitsandbytes."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from loraformat.bundle.integrity import verify_bundle
from loraformat.model.vocabulary import per_token
from loraformat.ops.combine.combine import combine
from loraformat.ops.convert.convert import convert
from loraformat.ops.extract.extract import extract
from loraformat.ops.merge.merge import merge
from loraformat.ops.reduce import reduce
from tests.adapters import merging
from tests.adapters.bundles import manifest
from tests.adapters.vocabularies import IDS, ROWS, adapter, logits, opened

GROWN = ROWS + 4
FORMS = ["modules_to_save", "tokens", "both targeted"]

#: Of the adapter, not the base.
OWN_TOKENIZER = '{"version": "its own"}'


def apart(one, other):
    return (one - other).abs().max().item() if one.shape == other.shape else float("inf")


def in_peft(base, path, rows=None):
    """Logits of a base with an adapter, the base resized first if that is asked for."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if rows is not None:
        model.resize_token_embeddings(rows)
    model = PeftModel.from_pretrained(model, path)
    # In training mode bitsandbytes does not repack its weights; dropout is GPT-2's.
    model.train(
        not any(isinstance(module, torch.nn.Dropout) and module.p for module in model.modules())
    )
    return model(input_ids=IDS).logits.detach().double()


def vocab_size(path):
    return json.loads((path / "config.json").read_text())["vocab_size"]


@pytest.fixture(scope="module", params=FORMS)
def grown(request, tmp_path_factory):
    """A base, its bundle, an adapter that grew the vocabulary, and what PEFT makes of the codes."""
    folder = tmp_path_factory.mktemp("grown")
    adapter("wide", request.param, GROWN, folder)
    (folder / "adapter" / "tokenizer.json").write_text(OWN_TOKENIZER)
    convert(folder / "base", folder / "bundle")
    convert(folder / "bundle", folder / "plain", to_format="safetensors", dtype="f32")
    return folder, in_peft(folder / "plain", folder / "adapter", GROWN)


def test_a_bundle_becomes_dense(grown, tmp_path):
    folder, truth = grown
    merge(folder / "bundle", [folder / "adapter"], tmp_path / "out", dtype="f32")
    assert apart(logits(opened(tmp_path / "out")), truth) < 2e-5


def test_beside_the_codes(grown, tmp_path):
    """The new bundle has the vocabulary, so that PEFT opens both as they are."""
    folder, truth = grown
    report = merge(folder / "bundle", [folder / "adapter"], tmp_path / "out",
                   to="loraformat", name="new")  # fmt: skip
    assert any("from 64 to 68 tokens" in note for note in report.notes)
    assert verify_bundle(tmp_path / "out") == []
    assert vocab_size(tmp_path / "out") == GROWN
    assert (tmp_path / "out" / "tokenizer.json").read_text() == OWN_TOKENIZER
    found = in_peft(tmp_path / "out", tmp_path / "out" / "adapters" / "new")
    assert apart(found, truth) < 1e-2 * truth.abs().max()  # bitsandbytes computes in 16 bits
    before, after = (merging.weights_of(path) for path in (folder / "bundle", tmp_path / "out"))
    assert before.keys() == after.keys()
    resized = {
        name for name in before if not torch.equal(before[name], after[name][: len(before[name])])
    }
    assert not resized and {n for n in before if before[n].shape != after[n].shape} == {
        "model.embed_tokens.weight", "lm_head.weight",
    }  # fmt: skip
    merge(
        tmp_path / "out", [tmp_path / "out" / "adapters" / "new"], tmp_path / "dense", dtype="f32"
    )
    assert apart(logits(opened(tmp_path / "dense")), truth) < 2e-5


def test_beside_the_codes_an_adapter_of_this_bundle_names_the_new_one(grown, tmp_path):
    folder, _ = grown
    convert(folder / "adapter", folder / "bundle" / "adapters" / "here", canonical=True, force=True)
    merge(folder / "bundle", [folder / "bundle" / "adapters" / "here"], tmp_path / "out",
          to="loraformat")  # fmt: skip
    assert verify_bundle(tmp_path / "out") == []
    assert manifest(tmp_path / "out")["fingerprint"] != manifest(folder / "bundle")["fingerprint"]
    merge(tmp_path / "out", [tmp_path / "out" / "adapters" / "here"], tmp_path / "dense")


@pytest.mark.parametrize("form", ["loraformat", "bitsandbytes"])
def test_quantized_again(grown, tmp_path, form):
    folder, truth = grown
    merge(folder / "bundle", [folder / "adapter"], tmp_path / "out", to=form,
          requantize=True)  # fmt: skip
    merge(folder / "bundle", [folder / "adapter"], tmp_path / "dense", dtype="f32")
    found, wanted = (merging.weights_of(tmp_path / name) for name in ("out", "dense"))
    for name in per_token(wanted):
        torch.testing.assert_close(found[name].float(), wanted[name], atol=0.02, rtol=0.01)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.get_input_embeddings().num_embeddings == vocab_size(tmp_path / "out") == GROWN
    with torch.no_grad():
        assert model(input_ids=IDS).logits.shape == truth.shape


def test_a_bundle_takes_it_with_a_note(grown, tmp_path):
    """It cannot be resized in place; what the note says is what works."""
    folder, truth = grown
    shutil.copytree(folder / "bundle", tmp_path / "bundle")
    place = tmp_path / "bundle" / "adapters" / "new"
    report = convert(folder / "adapter", place)
    assert any("68 tokens, and this base's 64: merge" in note for note in report.notes)
    assert verify_bundle(tmp_path / "bundle") == []
    merge(tmp_path / "bundle", [place], tmp_path / "out", dtype="f32")
    assert apart(logits(opened(tmp_path / "out")), truth) < 2e-5
    assert apart(in_peft(folder / "plain", place, GROWN), truth) < 2e-5


@pytest.mark.parametrize("verb", ["reduce", "combine", "canonical"])
def test_written_anew(grown, tmp_path, verb):
    """Keep all that the vocabulary needs, in names that PEFT finds."""
    folder, truth = grown
    source, target = folder / "adapter", tmp_path / "out"
    if verb == "reduce":
        reduce(source, target, rank=4)
    elif verb == "combine":
        combine([source], target)
    else:
        convert(source, target, canonical=True)
    assert apart(in_peft(folder / "plain", target, GROWN), truth) < 2e-5
    merge(folder / "plain", [target], tmp_path / "merged")
    assert apart(logits(opened(tmp_path / "merged")), truth) < 2e-5
    assert (tmp_path / "merged" / "tokenizer.json").read_text() == OWN_TOKENIZER


@pytest.mark.parametrize("model", ["llama", "llama tied", "gemma3", "gpt2"])
@pytest.mark.parametrize("rows", [ROWS + 4, ROWS - 4])
def test_an_extracted_adapter_merges_back(tmp_path, model, rows):
    made = adapter(model, "saved by itself", rows, tmp_path)
    tuned = made.merge_and_unload()
    tuned.save_pretrained(tmp_path / "tuned")
    extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "found", rank=8)
    merge(tmp_path / "base", [tmp_path / "found"], tmp_path / "merged")
    wanted = logits(opened(tmp_path / "tuned"))
    assert apart(logits(opened(tmp_path / "merged")), wanted) < 1e-4
    assert apart(in_peft(tmp_path / "base", tmp_path / "found", rows), wanted) < 1e-4
