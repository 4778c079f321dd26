"""Adapters of a resized vocabulary: the base becomes one of it, and computes as PEFT does."""

import json
from dataclasses import replace

import pytest
import torch

from loraformat.errors import UnsupportedError
from loraformat.model.vocabulary import Resize, per_token, resized, resized_config
from loraformat.ops.convert.convert import convert
from loraformat.ops.merge.merge import merge
from loraformat.ops.unmerge.unmerge import unmerge
from loraformat.tensors.torch_arrays import array_of, tensor_of
from loraformat.testing import dense
from tests.adapters import merging
from tests.adapters.vocabularies import FORMS, MODELS, ROWS, adapter, logits, opened, reloaded

#: Where PEFT does not save the rows of a head that grew: it loads what transformers grows then.
LOST = {("llama", "embedding targeted")}


def vocab_size(path):
    return json.loads((path / "config.json").read_text())["vocab_size"]


def apart(one, other):
    assert one.shape == other.shape
    return (one - other).abs().max().item()


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows", [ROWS + 4, ROWS - 4])
def test_as_peft_computes(tmp_path, model, form, rows):
    truth = logits(adapter(model, form, rows, tmp_path))
    merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged")
    found = logits(opened(tmp_path / "merged"))
    lost = rows > ROWS and (model, form) in LOST
    assert apart(found, truth) < (3e-4 if lost else 2e-5)
    assert vocab_size(tmp_path / "merged") == rows


@pytest.mark.parametrize("form", ["embedding to save", "head targeted", "both targeted"])
@pytest.mark.parametrize("model", ["llama", "gemma3"])
def test_rows_that_were_not_saved_are_those_that_transformers_grows(tmp_path, model, form):
    adapter(model, form, ROWS + 4, tmp_path, {"save_embedding_layers": False})
    merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged")
    # transformers adds noise to the mean: 1e-9 times the variance of what is there
    again = logits(reloaded(tmp_path, ROWS + 4))
    assert apart(logits(opened(tmp_path / "merged")), again) < 1e-3 < apart(again, 0 * again)


def write_tokenizer(folder, tokens, form="tokenizer.json"):
    """A tokenizer of that many tokens; the last ones stand beside a vocabulary of 60."""
    words = {f"t{number}": number for number in range(tokens)}
    first = dict(list(words.items())[:60])
    if form == "tokenizer.json":
        added = [{"id": n, "content": text} for text, n in words.items() if n >= 60]
        data = {"added_tokens": added, "model": {"type": "BPE", "vocab": first, "merges": []}}
        (folder / "tokenizer.json").write_text(json.dumps(data))
        return
    (folder / "vocab.json").write_text(json.dumps(first))
    more = {text: n for text, n in words.items() if n >= 60}
    (folder / "added_tokens.json").write_text(json.dumps(more))


@pytest.mark.parametrize("form", ["tokenizer.json", "vocab.json"])
@pytest.mark.parametrize("to", ["safetensors", "loraformat"])
def test_tokens_of_which_nothing_was_saved_are_named_and_the_remedy_holds(tmp_path, form, to):
    for saved in (False, True):
        folder = tmp_path / str(saved)
        adapter("wide", "saved by itself", ROWS + 4, folder, {"save_embedding_layers": saved})
        write_tokenizer(folder / "base", ROWS, form)
        write_tokenizer(folder / "adapter", ROWS + 4, form)
        base = folder / "base"
        if to == "loraformat":
            convert(base, folder / "bundle")
            base = folder / "bundle"
        report = merge(base, [folder / "adapter"], folder / "merged", to=to)
        said = [note for note in report.notes if "no rows for them" in note]
        assert len(said) == (not saved)
        assert saved or f"t{ROWS} and 3 more beyond the {ROWS} tokens" in said[0]
        assert vocab_size(folder / "merged") == ROWS + 4 * saved


def test_a_tokenizer_smaller_than_the_rows_is_not_spoken_of(tmp_path):
    adapter("llama", "saved by itself", ROWS + 4, tmp_path, {"save_embedding_layers": False})
    write_tokenizer(tmp_path / "base", ROWS - 4)
    write_tokenizer(tmp_path / "adapter", ROWS)
    report = merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged")
    assert not [note for note in report.notes if "no rows" in note]
    assert [note for note in report.notes if f"its tokenizer has t{ROWS - 4} and 3 more" in note]


def test_what_the_base_has_no_row_for_either_is_not_spoken_of(tmp_path):
    """Gemma 3's tokenizer has a token for images, and its text models no row for it."""
    adapter("llama", "saved by itself", ROWS + 4, tmp_path, {"save_embedding_layers": False})
    for name in ("base", "adapter"):
        write_tokenizer(tmp_path / name, ROWS + 1)
    report = merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged")
    assert not [note for note in report.notes if "no rows" in note]


def test_a_tied_head_stays_tied_where_both_become_the_same(tmp_path):
    for number, (form, tied) in enumerate(
        [("saved by itself", True), ("tokens", True), ("modules_to_save", False)]
    ):
        folder = tmp_path / str(number)
        adapter("gemma3", form, ROWS + 4, folder)
        merge(folder / "base", [folder / "adapter"], folder / "merged")
        config = json.loads((folder / "merged" / "config.json").read_text())
        assert config["tie_word_embeddings"] is tied
        assert ("lm_head.weight" not in merging.weights_of(folder / "merged")) is tied


def test_the_tokenizer_beside_the_adapter_is_taken_along(tmp_path):
    adapter("llama", "saved by itself", ROWS + 4, tmp_path)
    for name in ("tokenizer.json", "added_tokens.json", "LICENSE"):
        (tmp_path / "base" / name).write_text('"the base\'s"')
    report = merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "without")
    assert any("the adapter has no tokenizer" in note for note in report.notes)
    assert (tmp_path / "without" / "tokenizer.json").read_text() == '"the base\'s"'
    for name in ("tokenizer.json", "chat_template.jinja", "notes.txt"):
        (tmp_path / "adapter" / name).write_text('"its own"')
    report = merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "with")
    assert any("from 64 to 68 tokens; the tokenizer is that of" in n for n in report.notes)
    there = {path.name for path in (tmp_path / "with").iterdir()}
    assert {"tokenizer.json", "chat_template.jinja", "LICENSE"} <= there
    assert not there & {"added_tokens.json", "notes.txt"}
    assert (tmp_path / "with" / "tokenizer.json").read_text() == '"its own"'


def test_an_adapter_of_the_base_own_vocabulary_leaves_its_tokenizer(tmp_path):
    adapter("llama", "modules_to_save", ROWS, tmp_path)
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    (tmp_path / "adapter" / "tokenizer.json").write_text('{"version": "2"}')
    report = merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged")
    assert (tmp_path / "merged" / "tokenizer.json").read_text() == "{}"
    assert not any("vocabulary" in note for note in report.notes)


@pytest.mark.parametrize("form", ["tokens", "modules_to_save", "both targeted"])
@pytest.mark.parametrize("rows", [ROWS + 4, ROWS - 4])
def test_undone_bit_by_bit(tmp_path, form, rows):
    adapter("llama tied", form, rows, tmp_path)
    record = tmp_path / "merge.lfu"
    (tmp_path / "adapter" / "tokenizer.json").write_text("{}")
    merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged", undo=record)
    report = unmerge(tmp_path / "merged", tmp_path / "again", undo=record)
    assert report.exact
    assert any("has 64 tokens, but the tokenizer is still" in note for note in report.notes)
    before, after = (merging.weights_of(tmp_path / name) for name in ("base", "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    config = [(tmp_path / name / "config.json").read_bytes() for name in ("base", "again")]
    assert config[0] == config[1]


def test_several_adapters(tmp_path):
    """One grows the vocabulary, the other changes linears alone; or both must agree."""
    grown = adapter("llama", "modules_to_save", ROWS + 4, tmp_path / "grown")
    adapter("llama", "saved by itself", ROWS, tmp_path / "plain")
    base, two = tmp_path / "grown" / "base", tmp_path / "plain" / "adapter"
    one = tmp_path / "grown" / "adapter"
    merge(base, [two, one], tmp_path / "merged")
    grown.load_adapter(two, "other")
    grown.base_model.set_adapter(["default", "other"])
    assert apart(logits(opened(tmp_path / "merged")), logits(grown)) < 2e-5
    adapter("llama", "head targeted", ROWS, tmp_path / "head")
    with pytest.raises(
        UnsupportedError, match=r"has 64 tokens in lm_head\.weight, and 68 in"
    ) as no:
        merge(base, [one, tmp_path / "head" / "adapter"], tmp_path / "none")
    assert "one vocabulary" in no.value.hint
    assert not (tmp_path / "none").exists()


def test_weights_blend_with_the_grown_base(tmp_path):
    adapter("llama", "modules_to_save", ROWS + 4, tmp_path)
    merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "half", weight=[0.5])
    merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "whole")
    base, half, whole = (merging.weights_of(tmp_path / n) for n in ("base", "half", "whole"))
    for name in per_token(base):
        wanted = (tensor_of(resized(array_of(base[name]), ROWS + 4)) + whole[name]) / 2
        torch.testing.assert_close(half[name], wanted)


def test_rows_beyond_the_vocabulary(tmp_path):
    """What PEFT did not save is refused, and the remedy leads to the goal."""
    truth = logits(adapter("llama", "tokens", ROWS + 4, tmp_path, {"save_embedding_layers": False}))
    with pytest.raises(UnsupportedError, match="has a row for token 67, and ") as no:
        merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "none")
    assert "resize_token_embeddings, save_pretrained" in no.value.hint
    assert not (tmp_path / "none").exists()
    base = opened(tmp_path / "base")
    base.resize_token_embeddings(ROWS + 4)
    base.save_pretrained(tmp_path / "grown")
    merge(tmp_path / "grown", [tmp_path / "adapter"], tmp_path / "merged")
    found = logits(opened(tmp_path / "merged"))
    assert apart(found[..., :ROWS], truth[..., :ROWS]) < 2e-5  # the others were never saved


def test_one_adapter_of_two_vocabularies(tmp_path):
    base, _ = merging.small(tmp_path)
    wrong = merging.adapter(
        replacements={
            merging.EMBED: dense(merging.EMBED, torch.ones(12, 32)),
            "lm_head.weight": dense("lm_head.weight", torch.ones(11, 32)),
        }
    )
    with pytest.raises(UnsupportedError, match=r"has 11 tokens in lm_head\.weight, and 12 in"):
        merge(base, [wrong], tmp_path / "none")


def test_a_delta_that_names_any_number_of_tokens_is_not_believed(tmp_path):
    base, _ = merging.small(tmp_path)
    many = (1 << 20) + 1
    tall = merging.delta("lm_head.weight", 8, 32, rank=1)
    tall = replace(tall, b=replace(tall.b, shape=(many, 1)))
    with pytest.raises(UnsupportedError, match=f"has a delta of {many} tokens"):
        merge(base, [merging.adapter(tall)], tmp_path / "none")


def test_the_head_of_phi_has_a_bias(tmp_path):
    base, tensors = merging.small(tmp_path)
    more = {"lm_head.weight": torch.ones(10, 32), "lm_head.bias": torch.arange(10.0)}
    base = merging.save_model(tmp_path / "phi", tensors | more)
    wider = {"lm_head.weight": dense("lm_head.weight", torch.zeros(12, 32))}
    merge(base, [merging.adapter(replacements=wider)], tmp_path / "out")
    found = merging.weights_of(tmp_path / "out")
    assert found["lm_head.bias"].tolist() == [*range(10), 4.5, 4.5]
    assert len(found[merging.EMBED]) == len(found["lm_head.weight"]) == 12


def test_the_mean_is_that_of_many_rows():
    values = torch.randn(5000, 300).to(torch.bfloat16)
    grown = resized(array_of(values), 5003)
    wanted = values.double().mean(0).to(torch.bfloat16)
    assert all(torch.equal(row, wanted) for row in tensor_of(grown[5000:]))
    assert torch.equal(tensor_of(grown[:5000]), values)
    assert torch.equal(tensor_of(resized(array_of(values), 7)), values[:7])


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({"vocab_size": 8, "text_config": {"vocab_size": 8}}, [9, 9]),
        ({"vocab_size": 99, "text_config": {"vocab_size": 8}}, [99, 9]),
        ({"text_config": {"hidden_size": 4}}, [None, 9]),
        ({"text_config": {"vocab_size": 8}, "vision_config": {"vocab_size": 8}}, [None, 9, 8]),
    ],
)
def test_configs_of_wrappers(config, wanted):
    found = json.loads(resized_config(json.dumps(config).encode(), Resize(8, 9)))
    parts = [found, found["text_config"], found.get("vision_config", {})]
    assert [part.get("vocab_size") for part in parts][: len(wanted)] == wanted


def test_towers_that_see_have_no_tokens():
    names = ("vision_tower.embed_tokens.weight", "model.embed_tokens_per_layer.weight")
    assert not per_token({name: dense(name, torch.ones(4, 2)) for name in names})
