"""MXFP4: the experts of gpt-oss, decoded as transformers decodes them, without loss."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM, Mxfp4Config

from loraformat import plugins
from loraformat.errors import InputError, UnsupportedError
from loraformat.ops.convert.convert import convert
from loraformat.ops.opening.model import open_model
from tests.torch_tensors import numbers

SETTINGS = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router",
                               "model.embed_tokens", "lm_head"],
}  # fmt: skip
P = "model.layers.0.mlp.experts.gate_up_proj"


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A tiny gpt-oss as it is published: random blocks in the place of its experts."""
    torch.manual_seed(0)
    top = tmp_path_factory.mktemp("gpt-oss")
    config = GptOssConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, vocab_size=256, num_local_experts=4,
        num_experts_per_tok=2, sliding_window=8,
    )  # fmt: skip
    GptOssForCausalLM(config).bfloat16().save_pretrained(top)
    stored = {}
    for name, weight in load_file(top / "model.safetensors").items():
        if weight.ndim != 3:
            stored[name] = weight
            continue
        experts, into, out = weight.shape
        blocks = torch.randint(0, 256, (experts, out, into // 32, 16), dtype=torch.uint8)
        scales = torch.randint(110, 130, (experts, out, into // 32), dtype=torch.uint8)
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    save_file(stored, top / "model.safetensors", {"format": "pt"})
    settings = json.loads((top / "config.json").read_text())
    (top / "config.json").write_text(json.dumps({**settings, "quantization_config": SETTINGS}))
    return top


def copy(source, target, change=lambda tensors: tensors, **config):
    target.mkdir()
    tensors = change(load_file(source / "model.safetensors"))
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    settings = json.loads((source / "config.json").read_text()) | config
    (target / "config.json").write_text(json.dumps(settings))
    return target


def test_what_transformers_decodes(published, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(
        published, dtype=torch.bfloat16, quantization_config=Mxfp4Config(dequantize=True)
    )
    report = convert(published, tmp_path / "plain", to_format="safetensors")
    assert report.source_format == "mxfp4"
    found, wanted = load_file(tmp_path / "plain/model.safetensors"), model.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in found)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    ids = torch.arange(10)[None]
    assert torch.equal(opened(ids).logits, model(ids).logits)
    report = convert(published, tmp_path / "bundle")
    assert report.quantized == 12  # the projections of attention, and two stacks in each layer
    assert any("4 stacks of experts are in NF4" in note for note in report.notes)


def test_scales_may_be_of_their_own_type(published, tmp_path):
    def typed(tensors):
        return {n: t.view(torch.float8_e8m0fnu) if n.endswith("_scales") else t
                for n, t in tensors.items()}  # fmt: skip

    saved = copy(published, tmp_path / "typed", typed)
    for name, source in (("one", published), ("other", saved)):
        convert(source, tmp_path / name, to_format="safetensors")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "other"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_bfloat16_holds_every_value(published, tmp_path):
    convert(published, tmp_path / "f32", to_format="safetensors", dtype="f32")
    convert(published, tmp_path / "bf16", to_format="safetensors")
    wide = load_file(tmp_path / "f32/model.safetensors")
    near = load_file(tmp_path / "bf16/model.safetensors")
    assert torch.equal(wide[P], near[P].float())


def test_tensors_decide_without_a_word_in_the_config(published, tmp_path):
    path = copy(published, tmp_path / "m", quantization_config=None)
    assert plugins.sniff(path).name == "mxfp4"


def test_another_models_experts_may_lie_the_other_way_round(published, tmp_path):
    path = copy(published, tmp_path / "m", model_type="mixtral")
    with pytest.raises(UnsupportedError, match="only those of gpt_oss"):
        convert(path, tmp_path / "out")


@pytest.mark.parametrize(
    "change",
    [
        lambda t: {**t, P + "_scales": t[P + "_scales"][:, :-1].contiguous()},
        lambda t: {**t, P + "_scales": t[P + "_scales"].float()},
        lambda t: {**t, P + "_blocks": t[P + "_blocks"][..., :8].contiguous()},
        lambda t: {**t, P + "_blocks": t[P + "_blocks"].flatten(2)},
        lambda t: {name: tensor for name, tensor in t.items() if name != P + "_scales"},
    ],
)
def test_parts_that_do_not_fit_are_refused(published, tmp_path, change):
    path = copy(published, tmp_path / "m", change)
    with pytest.raises(InputError, match=r"gate_up_proj_blocks is .*wanted U8"):
        convert(path, tmp_path / "out")


def test_a_scale_that_is_no_number_is_found(published, tmp_path):
    def change(tensors):
        tensors[P + "_scales"][0, 0, 0] = 255
        return tensors

    path = copy(published, tmp_path / "m", change)
    with open_model(path) as model:
        assert numbers(model.tensors[P])[0, :32, 0].isnan().any()
