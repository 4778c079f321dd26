"""Every architecture: transformers and bitsandbytes open our bundle and compute what we decode."""

import json

import bitsandbytes
import pytest
import torch

from loraformat.ops.convert.convert import convert

# NF4 weights, of 2 layers each: attention and MLP, fused in phi3 and gpt2, without experts in MoE.
QUANTIZED = {
    "llama": 14,
    "llama-tied": 14,
    "mistral": 14,
    "qwen2": 14,
    "qwen3": 14,
    "gemma2": 14,
    "gemma3_text": 14,
    "gemma3": 14,
    "phi3": 8,
    "gpt2": 8,
    "mixtral": 8,
    "qwen3_moe": 8,
}
MOE = ("mixtral", "qwen3_moe")
#: Without experts a bundle opens without loraformat; `test_expert_stacks` has those with.
DENSE_EXPERTS = dict(skip=["*.experts.*"])

# Both sides compute in float32 from the same decoded weights: only the order of sums may differ.
TOLERANCE = dict(rtol=0, atol=1e-6)


@pytest.fixture(params=QUANTIZED)
def architecture(request):
    return request.param


@pytest.fixture
def bundle(source, architecture, tmp_path):
    report = convert(source(architecture), tmp_path / "bundle", **DENSE_EXPERTS)
    assert report.quantized == QUANTIZED[architecture]
    return tmp_path / "bundle"


def test_logits(bundle, architecture, source, load, logits, tmp_path):
    convert(bundle, tmp_path / "dense", to_format="safetensors")
    ours = logits(load(tmp_path / "dense", architecture))
    theirs = logits(load(bundle, architecture))
    original = logits(load(source(architecture), architecture))
    torch.testing.assert_close(theirs, ours, **TOLERANCE)
    assert 1e-3 < (theirs - original).abs().max() < original.abs().max(), "NF4 changes a little"


def test_peers_quantize_the_same_modules(bundle, architecture, load):
    model = load(bundle, architecture)
    modules = [m for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert len(modules) == QUANTIZED[architecture]
    assert all(m.weight.quant_state is not None for m in modules)


def test_every_decoded_weight(bundle, architecture, load, tmp_path):
    """Weight by weight, against bitsandbytes' own dequantization: equal to the last bit."""
    convert(bundle, tmp_path / "dense", to_format="safetensors")
    dense = dict(load(tmp_path / "dense", architecture).named_parameters())
    for name, module in load(bundle, architecture).named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weight = module.weight
            theirs = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
            ours = dense[f"{name}.weight"]
            assert torch.equal(theirs, ours.T if architecture == "gpt2" else ours), name


@pytest.mark.parametrize("architecture", MOE, indirect=True)
def test_experts_stay_plain_and_are_reported(source, architecture, tmp_path):
    for place, options in (("bundle", DENSE_EXPERTS), ("peer", {"to_format": "bitsandbytes"})):
        report = convert(source(architecture), tmp_path / place, **options)
        told = [note for note in report.notes if "24 expert weights" in note]
        assert "are not quantized" in told[0]
        config = json.loads((tmp_path / place / "config.json").read_bytes())
        assert "experts" in config["quantization_config"]["llm_int8_skip_modules"]


def test_dense_comes_back(source, architecture, load, stored, tmp_path):
    """Dense to dense: every file of the model, tensor by tensor and byte by byte."""
    convert(source(architecture), tmp_path / "dense", to_format="safetensors")
    assert stored(tmp_path / "dense") == stored(source(architecture))
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "dense" / name).read_bytes() == (
            source(architecture) / name
        ).read_bytes()


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_half_precision(source, load, logits, dtype, tmp_path):
    """Both sides round the same decoded weights; their matrix products differ by rounding."""
    convert(source("llama"), tmp_path / "bundle", dtype=dtype)
    convert(tmp_path / "bundle", tmp_path / "dense", to_format="safetensors")
    theirs, ours = load(tmp_path / "bundle"), load(tmp_path / "dense")
    assert theirs.dtype == ours.dtype == {"bf16": torch.bfloat16, "f16": torch.float16}[dtype]
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=0, atol=1e-2)
