"""The tensors outrank the config: a head that differs from the embedding is never tied to it."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from loraformat.model import tied_head
from loraformat.ops.check.check import check
from loraformat.ops.convert.convert import convert
from loraformat.ops.extract.extract import extract
from loraformat.ops.merge.merge import merge
from loraformat.ops.opening.model import open_model
from loraformat.ops.unmerge.unmerge import unmerge
from tests.heads.models import IDS, KINDS, adapter, flags, logits, make, opened

FORMATS = ("safetensors", "loraformat", "bitsandbytes")


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """Return a function: the directory of a model."""
    made = {}

    def get(kind, head):
        if (kind, head) not in made:
            made[kind, head] = make(kind, tmp_path_factory.mktemp("base") / f"{kind}-{head}", head)
        return made[kind, head]

    return get


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())


def dense_of(path, folder):
    """The numbers of any output, in float32 and as transformers reads them without kernels."""
    convert(path, folder, to_format="safetensors", dtype="f32")
    return opened(folder)


def assert_same(one, other):
    """Config and weights, bit for bit."""
    assert (one / "config.json").read_bytes() == (other / "config.json").read_bytes()
    tensors = [load_file(path / "model.safetensors") for path in (one, other)]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("to", FORMATS)
def test_a_conversion_keeps_a_head_that_differs_and_says_so(base, tmp_path, kind, to):
    source = base(kind, "other")
    report = convert(source, tmp_path / "out", to_format=to, dtype="f32")
    assert any("tie_word_embeddings is set to false" in note for note in report.notes)
    assert not any(flags(tmp_path / "out"))
    head = opened(source).lm_head.weight
    assert torch.equal(dense_of(tmp_path / "out", tmp_path / "dense").lm_head.weight, head)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head", ["none", "equal"])
def test_equal_heads_stay_tied(base, tmp_path, kind, head):
    source = base(kind, head)
    for to in ("safetensors", "loraformat"):
        report = convert(source, tmp_path / to, to_format=to)
        assert not any("tie" in note for note in report.notes)
        assert all(flags(tmp_path / to))
    convert(tmp_path / "loraformat", tmp_path / "back", to_format="safetensors")
    for name in ("safetensors", "back"):
        assert (tmp_path / name / "config.json").read_bytes() == (
            source / "config.json"
        ).read_bytes()


def test_a_head_that_is_quantized_alone_differs(base, tmp_path):
    report = convert(base("llama", "equal"), tmp_path / "bundle", include=["lm_head.weight"])
    assert not any(flags(tmp_path / "bundle"))
    assert any("differs" in note for note in report.notes)


def test_a_flag_that_is_left_out_means_what_the_class_means(base, tmp_path):
    for kind, tied in (("gpt2", True), ("llama", False)):
        source = make(kind, tmp_path / kind, "other")
        config = json.loads((source / "config.json").read_bytes())
        del config["tie_word_embeddings"]
        (source / "config.json").write_text(json.dumps(config))
        convert(source, tmp_path / f"{kind}-out", to_format="safetensors")
        written = json.loads((tmp_path / f"{kind}-out" / "config.json").read_bytes())
        assert written.get("tie_word_embeddings") is (False if tied else None)


TARGETS = {
    "llama": ["q_proj", "lm_head"],
    "gemma3": ["q_proj", "lm_head"],
    "gpt2": ["c_attn", "lm_head"],
}


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("head", ["none", "equal", "other"])
def test_a_merged_head_is_written_as_one_of_its_own(base, tmp_path, kind, head):
    source = base(kind, head)
    wanted = adapter(source, tmp_path / "adapter", *TARGETS[kind])
    merge(source, [tmp_path / "adapter"], tmp_path / "out", undo=tmp_path / "undo")
    assert not any(flags(tmp_path / "out"))
    assert apart(logits(opened(tmp_path / "out")), wanted) < 1e-5
    unmerge(tmp_path / "out", tmp_path / "back", undo=tmp_path / "undo")
    assert_same(tmp_path / "back", source)


@pytest.mark.parametrize("to", FORMATS)
def test_a_merged_head_in_every_format(base, tmp_path, to):
    source = base("gemma3", "equal")
    adapter(source, tmp_path / "adapter", "lm_head")
    quantized = to != "safetensors"
    merge(source, [tmp_path / "adapter"], tmp_path / "out", to=to, requantize=quantized)
    assert flags(tmp_path / "out") == [False, False]
    merge(source, [tmp_path / "adapter"], tmp_path / "dense")
    ours, wanted = (
        dense_of(tmp_path / name, tmp_path / f"{name}-dense").lm_head.weight
        for name in ("out", "dense")
    )
    assert torch.equal(ours, wanted)


def test_merged_beside_its_codes_the_head_stays_what_it_is(base, tmp_path):
    convert(base("llama", "other"), tmp_path / "bundle")
    config = json.loads((tmp_path / "bundle" / "config.json").read_bytes())
    convert(tmp_path / "bundle", tmp_path / "bnb-out", to_format="bitsandbytes")
    (tmp_path / "bnb-out" / "config.json").write_text(
        json.dumps({**config, "tie_word_embeddings": True})  # as another program may write it
    )
    adapter(base("llama", "other"), tmp_path / "adapter", "lm_head")
    report = merge(tmp_path / "bnb-out", [tmp_path / "adapter"], tmp_path / "out",
                   to="loraformat")  # fmt: skip
    assert not any(flags(tmp_path / "out"))
    assert any("tie_word_embeddings is set to false" in note for note in report.notes)


@pytest.mark.parametrize(
    ("targets", "together"),
    [(["q_proj"], False), (["embed_tokens"], False), (["embed_tokens"], True),
     (["embed_tokens", "lm_head"], True), (["embed_tokens", "lm_head"], False)],
)  # fmt: skip
@pytest.mark.parametrize("head", ["none", "equal"])
def test_merging_onto_an_equal_head_is_merging_onto_a_tied_one(
    base, tmp_path, head, targets, together
):
    source = base("llama", head)
    wanted = adapter(source, tmp_path / "adapter", *targets, ensure_weight_tying=together)
    merge(source, [tmp_path / "adapter"], tmp_path / "out", undo=tmp_path / "undo")
    assert apart(logits(opened(tmp_path / "out")), wanted) < 1e-5
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    equal = torch.equal(tensors.get("lm_head.weight", embedding), embedding)
    assert flags(tmp_path / "out") == [equal]
    assert equal is (together or targets == ["q_proj"])
    unmerge(tmp_path / "out", tmp_path / "back", undo=tmp_path / "undo")
    assert_same(tmp_path / "back", source)


@pytest.mark.parametrize("head", ["none", "equal"])
def test_trained_tokens_are_shown_to_an_equal_head_too(base, tmp_path, head):
    source = base("llama", head)
    wanted = adapter(source, tmp_path / "adapter", "q_proj", trainable_token_indices=[3, 9])
    merge(source, [tmp_path / "adapter"], tmp_path / "out", undo=tmp_path / "undo")
    assert apart(logits(opened(tmp_path / "out")), wanted) < 1e-5
    assert flags(tmp_path / "out") == [True]
    unmerge(tmp_path / "out", tmp_path / "back", undo=tmp_path / "undo")
    assert_same(tmp_path / "back", source)


@pytest.mark.parametrize("heads", [("equal", "none"), ("none", "equal"), ("equal", "equal"),
                                   ("other", "none"), ("none", "other")])  # fmt: skip
def test_extracted_between_heads_of_any_form(base, tmp_path, heads):
    before, after = base("llama", heads[0]), tmp_path / "tuned"
    adapter(base("llama", heads[1]), tmp_path / "adapter", "q_proj", "embed_tokens",
            ensure_weight_tying=True)  # fmt: skip
    merge(base("llama", heads[1]), [tmp_path / "adapter"], after)
    extract(before, after, tmp_path / "found", rank=64)
    wanted = logits(opened(after))
    assert apart(logits(opened(before, tmp_path / "found")), wanted) < 1e-3
    merge(before, [tmp_path / "found"], tmp_path / "again")
    assert apart(logits(opened(tmp_path / "again")), wanted) < 1e-3


def test_check_knows_a_tied_head_by_its_numbers(base, tmp_path):
    adapter(base("llama", "none"), tmp_path / "adapter", "lm_head")
    for head, tied in (("none", True), ("equal", True), ("other", False)):
        report = check(tmp_path / "adapter", base=base("llama", head))
        assert ("TIED_HEAD" in {finding.rule for finding in report.findings}) is tied, head


@pytest.mark.parametrize(
    ("head", "old"), [("none", False), ("equal", False), ("other", False), ("other", True)]
)
def test_the_trainer_computes_with_the_file_s_head(base, tmp_path, monkeypatch, head, old):
    from loraformat.train import load

    if old:  # a bundle of earlier times, with the source's config
        monkeypatch.setattr("loraformat.ops.convert.convert.settled", lambda model: (model, []))
    convert(base("llama", head), tmp_path / "bundle")
    assert flags(tmp_path / "bundle") == [old or head != "other"]
    convert(tmp_path / "bundle", tmp_path / "dense", to_format="safetensors", dtype="f32")
    wanted = logits(opened(tmp_path / "dense"))
    with load(tmp_path / "bundle") as model, torch.no_grad():
        assert apart(model(input_ids=IDS).logits, wanted) < 1e-5


@pytest.mark.parametrize("head", ["equal", "other"])
def test_a_bundle_opens_in_transformers_with_its_head(base, tmp_path, head):
    source = base("qwen2", head)
    for to in ("loraformat", "bitsandbytes"):
        convert(source, tmp_path / to, to_format=to)
        model = opened(tmp_path / to)
        assert torch.equal(model.lm_head.weight.float(), opened(source).lm_head.weight)


def test_what_is_settled_reads_no_more_than_it_must(base):
    with open_model(base("llama", "none")) as model:
        assert tied_head.settled(model) == (model, [])
        assert tied_head.tied_head(model) == tied_head.TiedHead("model.embed_tokens.weight")
    with open_model(base("llama", "equal")) as model:
        assert tied_head.tied_head(model).copy == "lm_head.weight"
        assert tied_head.contradicting_head(model) is None
    with open_model(base("llama", "other")) as model:
        assert tied_head.tied_head(model) is None
        assert tied_head.contradicting_head(model) == "lm_head.weight"
