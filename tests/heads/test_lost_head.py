"""A model whose output head is missing is never written: transformers would make one of chance."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from loraformat.errors import InputError
from loraformat.model.tied_head import refuse_lost_head
from loraformat.ops.convert.convert import convert
from loraformat.ops.merge.merge import merge
from loraformat.ops.opening.model import open_model
from tests.heads.models import IDS, adapter, logits, make, opened


def edit(path, **members):
    config = json.loads((path / "config.json").read_bytes())
    (path / "config.json").write_text(json.dumps({**config, **members}))


@pytest.fixture(scope="module")
def lost(tmp_path_factory):
    """A directory without the head that its config speaks of, and an adapter of it."""
    folder = tmp_path_factory.mktemp("lost")
    base = make("llama", folder / "base", "other")
    edit(base, tie_word_embeddings=False)
    adapter(base, folder / "adapter", "q_proj")
    adapter(base, folder / "whole", "q_proj", modules_to_save=["lm_head"])
    tensors = load_file(base / "model.safetensors")
    torch.save(tensors.pop("lm_head.weight"), folder / "head.pt")
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    return folder


def refusal(action) -> str:
    with pytest.raises(InputError, match=r"lm_head\.weight is missing") as error:
        action()
    return error.value.hint


@pytest.mark.parametrize("to", ["safetensors", "loraformat", "bitsandbytes", "gguf"])
def test_no_format_gets_a_model_that_lost_its_head(lost, tmp_path, to):
    target = tmp_path / "out.gguf"
    hint = refusal(lambda: convert(lost / "base", target, to_format=to, dtype="f32"))
    assert '"tie_word_embeddings": true' in hint and '"architectures": ["LlamaModel"]' in hint
    refusal(lambda: convert(lost / "base", target, to_format=to, dtype="f32", dry_run=True))
    assert not target.exists()


@pytest.mark.parametrize("options", [{}, {"to": "loraformat", "requantize": True}])
def test_no_merge_writes_one(lost, tmp_path, options):
    refusal(lambda: merge(lost / "base", [lost / "adapter"], tmp_path / "out", **options))
    assert not (tmp_path / "out").exists()


def test_a_bundle_that_an_older_version_wrote_is_not_written_on(lost, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("loraformat.ops.convert.convert.refuse_lost_head", lambda model: None)
        convert(lost / "base", tmp_path / "bundle")
    refusal(lambda: convert(tmp_path / "bundle", tmp_path / "out", to_format="safetensors"))
    refusal(
        lambda: merge(tmp_path / "bundle", [lost / "adapter"], tmp_path / "out", to="loraformat")
    )


def test_each_remedy_leads_to_the_goal(lost, tmp_path):
    tensors = load_file(lost / "base" / "model.safetensors")
    for name in ("fetched", "tied", "embeds"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_bytes((lost / "base/config.json").read_bytes())
        save_file(tensors, tmp_path / name / "model.safetensors", {"format": "pt"})
        refusal(lambda name=name: convert(tmp_path / name, tmp_path / "none"))
    head = torch.load(lost / "head.pt")
    files = {**tensors, "lm_head.weight": head}
    save_file(files, tmp_path / "fetched" / "model.safetensors", {"format": "pt"})
    edit(tmp_path / "tied", tie_word_embeddings=True)
    edit(tmp_path / "embeds", architectures=["LlamaModel"])
    for name in ("fetched", "tied", "embeds"):
        convert(tmp_path / name, tmp_path / f"{name}-out", to_format="safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    for name, expected in (("fetched", head), ("tied", embedding)):
        assert torch.equal(opened(tmp_path / f"{name}-out").lm_head.weight, expected)
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    model = AutoModel.from_pretrained(tmp_path / "embeds-out", **options).eval()
    fetched = opened(tmp_path / "fetched-out").model
    with torch.no_grad():
        states = [one(input_ids=IDS).last_hidden_state for one in (model, fetched)]
    assert torch.equal(*states)


@pytest.mark.parametrize(
    "config, names, width",
    [
        ({"architectures": ["GPTNeoXForCausalLM"]}, ["embed_in.weight", "embed_out.weight"], 8),
        ({"architectures": ["RemoteForCausalLM"]}, ["word_embeddings.weight", "output.weight"], 8),
        ({"architectures": ["LlamaForSequenceClassification"]}, ["embed_tokens.weight"], 8),
        ({"architectures": ["LlamaModel"]}, ["embed_tokens.weight"], 8),
        ({}, ["embed_tokens.weight"], 8),
    ],
)
def test_a_head_by_another_name_or_none_by_design_is_taken(tmp_path, config, names, width):
    config = {"model_type": "llama", "tie_word_embeddings": False, **config}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = {f"model.{name}": torch.zeros(16, width) for name in names}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with open_model(tmp_path) as model:
        refuse_lost_head(model)


def test_an_adapter_may_bring_the_head(lost, tmp_path):
    merge(lost / "base", [lost / "whole"], tmp_path / "out")
    saved = load_file(lost / "whole" / "adapter_model.safetensors")
    head = next(tensor for name, tensor in saved.items() if "lm_head" in name)
    assert torch.equal(opened(tmp_path / "out").lm_head.weight, head)
    assert torch.isfinite(logits(opened(tmp_path / "out"))).all()
