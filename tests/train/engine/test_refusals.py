"""What cannot be trained from mapped bytes is refused, by name, before anything is computed."""

import json
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from loraformat.errors import InputError, MissingDependencyError, UnsupportedError, UsageError
from loraformat.ops.convert.convert import convert
from loraformat.train import load
from loraformat.train.engine import bind_weights, trial
from tests.tiny_models import make_model
from tests.train.engine.reference import make_batch


@pytest.fixture
def changed(tmp_path):
    """Returns a bundle of a llama whose config says something else."""

    def make(**fields):
        dense = make_model("llama", tmp_path / "dense")
        config = json.loads((dense / "config.json").read_text())
        (dense / "config.json").write_text(json.dumps({**config, **fields}))
        convert(dense, tmp_path / "bundle")
        return tmp_path / "bundle"

    return make


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"num_hidden_layers": 3}, "config wants 3 layers, and it holds 2"),
        ({"num_hidden_layers": 10**9}, "config wants 1000000000 layers"),
        ({"num_hidden_layers": 1}, r"9 of its tensors have no place .*model\.layers\.1\."),
        ({"intermediate_size": 95}, r"is \[96, 64\], and parameter .* wants \[95, 64\]"),
        ({"attention_bias": True}, r"parameter .*q_proj\.bias has no tensor"),
        ({"model_type": "no-such-model"}, "transformers knows no model type no-such-model"),
        ({"model_type": "bert"}, "transformers cannot|no place|no tensor"),
        ({"hidden_size": "wide"}, "transformers cannot"),
    ],
)
def test_a_config_that_does_not_fit_the_tensors(changed, fields, message):
    with pytest.raises(UnsupportedError, match=message) as caught:
        load(changed(**fields))
    assert "bundle" in str(caught.value.path)


def test_a_large_parameter_of_an_unknown_class(bundle_of, monkeypatch):
    monkeypatch.setattr(bind_weights, "_LARGEST_COPY", 200)
    expected = r"layers\.0\.mlp\.gate\.weight of MixtralTopKRouter has 256 elements \(\[4, 64\]\)"
    with pytest.raises(UnsupportedError, match=expected):
        load(bundle_of("mixtral"))


def test_a_class_that_computes_with_large_weights_itself(bundle_of, monkeypatch):
    monkeypatch.setattr(trial, "_MOST_HELD", 100)
    with pytest.raises(UnsupportedError, match=r"computes with the weight of backbone\.layers\.0"):
        load(bundle_of("mamba"))


def test_a_class_that_counts_positions_in_its_own_way(bundle_of):
    with pytest.raises(UnsupportedError, match="RobertaForCausalLM counts positions"):
        load(bundle_of("roberta"))


def test_no_code_of_the_model_is_run(changed, tmp_path):
    bundle = changed(auto_map={"AutoModelForCausalLM": "evil.Evil", "AutoConfig": "evil.Config"})
    (bundle / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with load(bundle) as model:
        assert type(model.base).__name__ == "LlamaForCausalLM"
    assert not (tmp_path / "ran").exists()


def test_what_is_no_bundle_says_how_to_make_one(bundle_of, tmp_path):
    with pytest.raises(UnsupportedError, match="is not a bundle") as caught:
        load(bundle_of("llama").parent / "dense")
    assert "loraformat convert" in str(caught.value)
    with pytest.raises(InputError):
        load(tmp_path / "nothing")


def test_an_odd_compute_dtype(bundle_of):
    with pytest.raises(UsageError, match="wanted float32, bfloat16 or float16"):
        load(bundle_of("llama"), compute_dtype=torch.int8)


def test_without_transformers(bundle_of, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'loraformat\[train\]'"):
        load(bundle_of("llama"))


def test_rows_at_once_where_rows_cannot_be_cut(bundle_of):
    with (
        load(bundle_of("bloom")).eval() as model,
        torch.no_grad(),
        pytest.raises(UnsupportedError, match="cannot be cut into groups of rows"),
    ):
        model.loss(make_batch(), rows_at_once=1)


def test_an_adapter_or_a_data_file_in_the_place_of_the_base(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "adapter_config.json").write_text("{}")
    with pytest.raises(UnsupportedError, match="with --adapter"):
        load(tmp_path / "a")
    (tmp_path / "data.jsonl").write_text("{}")
    with pytest.raises(UnsupportedError, match="then the data"):
        load(tmp_path / "data.jsonl")


def test_a_model_of_images_is_trained_as_the_refusal_says(tmp_path):
    torch.manual_seed(0)
    text = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=256,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        image_size=32, patch_size=16, projection_dim=32,
    )  # fmt: skip
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=255)
    LlavaForConditionalGeneration(config).bfloat16().save_pretrained(tmp_path / "dense")
    convert(tmp_path / "dense", tmp_path / "bundle")
    with pytest.raises(UnsupportedError, match=r"model of images and text \(llava\)") as refused:
        load(tmp_path / "bundle")
    assert "AutoModelForImageTextToText.from_pretrained(BUNDLE)" in refused.value.hint
    base = AutoModelForImageTextToText.from_pretrained(tmp_path / "bundle", dtype=torch.float32)
    targets = r".*language_model.*(q_proj|v_proj)"
    model = get_peft_model(base, LoraConfig(r=2, target_modules=targets))
    ids = torch.arange(10)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    assert sum(parameter.grad is not None for parameter in model.parameters()) == 8
