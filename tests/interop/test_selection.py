"""``--skip`` and ``--include``: transformers obeys what quantization_config says of them."""

import json

import bitsandbytes
import pytest
import torch

from loraformat.ops.convert.convert import convert

CASES = {
    "one kind": ("llama", ["*.down_proj"], [], 12),
    "one layer": ("llama", ["model.layers.1.*"], [], 7),
    "one weight": ("qwen3", ["model.layers.0.mlp.gate_proj"], [], 13),
    "the head too": ("llama", [], ["lm_head"], 15),
    "the head, but not a kind": ("llama", ["*.q_proj"], ["lm_head.weight"], 13),
    "Conv1D": ("gpt2", ["*.c_fc"], [], 6),
    "fused": ("phi3", ["*.qkv_proj"], [], 6),
    "beside experts": ("mixtral", ["*.k_proj", "*.experts.*"], [], 6),
    "inside a larger model": ("gemma3", ["*.layers.0.mlp.down_proj"], [], 13),
    "other towers too": ("gemma3", [], ["vision_tower.encoder.layers.1.mlp.fc1"], 15),
}


@pytest.mark.parametrize("case", CASES)
def test_peers_agree(source, load, logits, tmp_path, case):
    architecture, skip, include, count = CASES[case]
    report = convert(source(architecture), tmp_path / "bundle", skip=skip, include=include)
    assert report.quantized == count
    convert(tmp_path / "bundle", tmp_path / "dense", to_format="safetensors")
    model = load(tmp_path / "bundle", architecture)
    modules = [m for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert len(modules) == count
    ours = logits(load(tmp_path / "dense", architecture))
    torch.testing.assert_close(logits(model), ours, rtol=0, atol=1e-6)


def test_the_choice_survives_another_conversion(source, tmp_path):
    convert(source("llama"), tmp_path / "bundle", skip=["*.down_proj"])
    convert(tmp_path / "bundle", tmp_path / "peer", to_format="bitsandbytes")
    convert(tmp_path / "peer", tmp_path / "again")
    names = {"model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj", "lm_head"}
    for place in ("bundle", "peer", "again"):
        config = json.loads((tmp_path / place / "config.json").read_bytes())
        assert set(config["quantization_config"]["llm_int8_skip_modules"]) == names


@pytest.mark.parametrize("double_quant", [True, False])
def test_another_block_size(source, load, logits, tmp_path, double_quant):
    convert(source("llama"), tmp_path / "bundle", block_size=32, double_quant=double_quant)
    convert(tmp_path / "bundle", tmp_path / "dense", to_format="safetensors")
    model = load(tmp_path / "bundle")
    weights = [m.weight for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert {weight.quant_state.blocksize for weight in weights} == {32}
    assert {weight.quant_state.nested for weight in weights} == {double_quant}
    ours = logits(load(tmp_path / "dense"))
    torch.testing.assert_close(logits(model), ours, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "architecture, pattern",
    [("llama", "model.embed_tokens"), ("mixtral", "*.gate")],
)
def test_what_peers_cannot_open_is_said(source, load, tmp_path, architecture, pattern):
    """transformers has no 4-bit embedding, router or expert: the report says so beforehand."""
    report = convert(source(architecture), tmp_path / "bundle", include=[pattern])
    assert any("transformers cannot open the result" in note for note in report.notes)
    with pytest.raises(RuntimeError):
        load(tmp_path / "bundle", architecture)
    convert(tmp_path / "bundle", tmp_path / "dense", to_format="safetensors")
    load(tmp_path / "dense", architecture)
