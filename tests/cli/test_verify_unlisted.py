"""``verify`` names files that no hash covers and that transformers would load; others it leaves."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from loraformat.demo import SMALL_MODEL
from loraformat.ops.convert.convert import convert
from loraformat.ops.opening.model import open_model
from loraformat.ops.verify import verify
from tests.torch_tensors import numbers


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    top = tmp_path_factory.mktemp("bundles")
    convert(SMALL_MODEL, top / "bundle")
    return top / "bundle"


@pytest.fixture
def bundle(bundles, tmp_path):
    return shutil.copytree(bundles, tmp_path / "bundle")


@pytest.mark.parametrize(
    "name", ["adapter_config.json", "vocab.json", "merges.txt",
             "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
             "additional_chat_templates/x.jinja", "processor_config.json", "modeling_mine.py"]
)  # fmt: skip
def test_a_file_that_would_be_loaded(bundle, name):
    assert verify(bundle).findings == []
    (bundle / name).parent.mkdir(exist_ok=True)
    (bundle / name).write_bytes(b"{}")
    (finding,) = verify(bundle).findings
    assert finding.path == str(bundle / name)
    assert "not listed in the manifest, but transformers would load it" in finding.problem
    (bundle / name).unlink()  # as it advises
    assert verify(bundle).findings == []


@pytest.mark.parametrize("name", ["README.md", "notes.txt", "pictures/loss.png", ".gitattributes",
                                  "model.safetensors.bak", "optimizer.pt"])  # fmt: skip
def test_a_file_that_nobody_loads(bundle, name):
    (bundle / name).parent.mkdir(exist_ok=True)
    (bundle / name).write_bytes(b"mine")
    assert verify(bundle).findings == []


def test_what_it_says_of_transformers_is_true(bundle):
    """A stray template is taken, and a stray model in the place of the shards."""
    (bundle / "chat_template.jinja").write_text("stray {{ messages[0].content }}")
    tokenizer = AutoTokenizer.from_pretrained(bundle)
    messages = [{"role": "user", "content": "x"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "stray x"
    assert len(verify(bundle).findings) == 1


def test_a_stray_shard_is_found_by_the_rules(bundle):
    (bundle / "model.safetensors").write_bytes(b"{}")
    (finding,) = verify(bundle).findings
    assert finding.rule.startswith("B")
    assert "model.safetensors" in finding.path + finding.problem


def test_a_single_file_is_taken_before_an_index_as_transformers_takes_it(tmp_path):
    convert(SMALL_MODEL, tmp_path / "model", to_format="safetensors", max_shard_size=2_000_000)
    assert (tmp_path / "model/model.safetensors.index.json").exists()
    tensors = load_file(Path(SMALL_MODEL, "model.safetensors"))
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 2
    save_file(tensors, tmp_path / "model/model.safetensors", {"format": "pt"})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    with open_model(tmp_path / "model") as ours:
        norm = numbers(ours.tensors["model.norm.weight"])
        assert torch.equal(norm, loaded.model.norm.weight)
        assert torch.equal(norm, tensors["model.norm.weight"])
        assert any("model-00001-of" in said for said in ours.left_behind)
