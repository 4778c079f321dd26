"""Mixtures of experts in 4 bits: transformers opens them, and computes what we decode."""

import json
import re

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.quantizers import auto

import loraformat
import loraformat.transformers
from loraformat.errors import InputError, MissingDependencyError, UnsupportedError
from loraformat.families.table import family_of
from loraformat.model.checkpoint import NF4Tensor
from loraformat.model.config_json import parse
from loraformat.model.nf4_parts import SEGMENT_METHOD
from loraformat.ops.convert.convert import convert
from loraformat.ops.encoding import expert_stacks
from tests.adapters import moe_models

FAMILIES = [
    "aria_text", "deepseek_v2", "deepseek_v3", "ernie4_5_moe", "gemma4_text", "glm4_moe", "gpt_oss",
    "granitemoe", "hunyuan_v1_moe", "jamba", "lfm2_moe", "llama4_text", "longcat_flash",
    "minimax_m2", "mixtral", "nemotron_h", "olmoe", "phimoe", "qwen2_moe", "qwen3_5_moe_text",
    "qwen3_moe", "qwen3_next",
]  # fmt: skip
#: Their tiny models have large routers, or linears outside of the layers or inside of norms.
LESS = {"axk2": 0.9, "qwen4_exp": 0.8, "qwen4_exp_text": 0.8, "zaya": 0.15}
#: Its fifth expert, which computes nothing, has a gate and an up and no down.
IRREGULAR = {"longcat_flash"}
#: Rows of whole blocks: bitsandbytes decodes others wrongly on a CPU.
ROWS = dict(
    intermediate_size=64, moe_intermediate_size=64, shared_expert_intermediate_size=64,
    q_lora_rank=64, kv_lora_rank=64, ffn_hidden_size=64, expert_ffn_hidden_size=64,
    moe_shared_expert_intermediate_size=64,
)  # fmt: skip


def save(model_type, path, **changes):
    model = moe_models.make(model_type, **changes)
    model.save_pretrained(path)
    return model


def opened(path, **options):
    eager = dict(attn_implementation="eager", experts_implementation="eager")
    found, info = transformers.AutoModelForCausalLM.from_pretrained(
        path, output_loading_info=True, dtype=torch.float32, **eager, **options
    )
    assert not any(info.values()), info
    return found.train()  # bitsandbytes changes its weights in eval mode on a CPU


@pytest.mark.parametrize("model_type", FAMILIES)
def test_logits_are_those_of_our_own_decoding(model_type, tmp_path):
    original = save(model_type, tmp_path / "model", **ROWS)
    report = convert(tmp_path / "model", tmp_path / "bundle")
    assert any("import loraformat.transformers" in note for note in report.notes)
    convert(tmp_path / "bundle", tmp_path / "dense", to_format="safetensors")
    ours = moe_models.logits(opened(tmp_path / "dense"))
    theirs = moe_models.logits(opened(tmp_path / "bundle"))
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-6)
    assert (theirs - moe_models.logits(original)).abs().max() > 1e-3, "NF4 changes a little"


@pytest.mark.parametrize("model_type", moe_models.model_types())
def test_nearly_all_of_every_mixture_is_in_4_bits(model_type, tmp_path):
    model = save(model_type, tmp_path / "model")
    convert(tmp_path / "model", tmp_path / "bundle")
    linear = sum(
        module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "lm_head" not in name
    )
    stacks = sum(
        p.numel() for name, p in model.named_parameters() if p.ndim == 3 and "conv" not in name
    )
    with loraformat.open_bundle(tmp_path / "bundle") as bundle:
        tensors = bundle.tensors.values()
        quantized = [tensor for tensor in tensors if isinstance(tensor, NF4Tensor)]
        plain = {tensor.name for tensor in tensors if not isinstance(tensor, NF4Tensor)}
    count = sum(tensor.count for tensor in quantized)
    assert count / (linear + stacks) >= LESS.get(model_type, 0.95)
    assert sum(tensor.nbytes for tensor in quantized) * 8 / count <= 4.2
    projection = re.compile(r"experts?\.(\d+\.)?\w*_proj(\.weight)?$")
    assert not [name for name in plain if projection.search(name)]
    router = re.compile(r"\.(router|gate|router_gate)\.weight$")
    assert not [tensor.name for tensor in quantized if router.search(tensor.name)]


def test_a_dense_model_is_version_1_0_and_a_mixture_1_1(source, tmp_path):
    for name, version in (("llama", "1.0"), ("qwen3_moe", "1.1")):
        convert(source(name), tmp_path / name)
        manifest = json.loads((tmp_path / name / "loraformat.json").read_bytes())
        assert manifest["format_version"] == version


def test_without_the_import_the_message_names_it(source, tmp_path, monkeypatch):
    convert(source("qwen3_moe"), tmp_path / "bundle")
    said = []
    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, SEGMENT_METHOD)
    monkeypatch.setattr(auto.logger, "warning", said.append)
    with pytest.raises(RuntimeError):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "bundle")
    assert any("import loraformat.transformers" in message for message in said)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "llama4_text"])
def test_peft_trains_experts_on_a_bundle(model_type, tmp_path):
    save(model_type, tmp_path / "model", **ROWS)
    convert(tmp_path / "model", tmp_path / "bundle")
    convert(tmp_path / "bundle", tmp_path / "dense", to_format="safetensors")
    names = [n for n, p in opened(tmp_path / "dense").named_parameters() if p.ndim == 3]
    found = {}
    for kind in ("bundle", "dense"):
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=names)
        model = peft.get_peft_model(opened(tmp_path / kind), config).train()
        random = torch.Generator().manual_seed(0)
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name:
                values = torch.randn(parameter.shape, generator=random)
                parameter.data.copy_(values * 0.1)
        model.enable_input_require_grads()
        model(moe_models.TOKENS, labels=moe_models.TOKENS).loss.backward()
        found[kind] = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert found["bundle"].keys() == found["dense"].keys()
    assert any("experts" in name for name in found["bundle"])
    for name, gradient in found["dense"].items():
        torch.testing.assert_close(found["bundle"][name], gradient, rtol=1e-4, atol=1e-7)


def test_any_device_decodes_the_same_bits(source, tmp_path):
    """The formula for devices that the codec's kernels do not know, here on a CPU."""
    convert(source("qwen3_moe"), tmp_path / "bundle")
    stack = opened(tmp_path / "bundle").model.layers[0].mlp.experts.gate_up_proj
    for number, matrix in enumerate(stack):
        assert torch.equal(stack.formula(number).view_as(matrix), matrix)


def test_a_stack_is_not_changed_in_place(source, tmp_path):
    convert(source("qwen3_moe"), tmp_path / "bundle")
    stack = opened(tmp_path / "bundle").model.layers[0].mlp.experts.gate_up_proj
    with pytest.raises(UnsupportedError, match="in place"):
        stack.data += 1
    assert torch.equal(stack[1], (stack * 1)[1])
    assert stack.to("cpu", torch.bfloat16).dtype == torch.bfloat16


def test_saving_is_refused(source, tmp_path):
    convert(source("qwen3_moe"), tmp_path / "bundle")
    with pytest.raises(ValueError, match="not serializable"):
        opened(tmp_path / "bundle").save_pretrained(tmp_path / "again")
    assert not list(tmp_path.glob("again/*.safetensors"))


@pytest.mark.parametrize("model_type", moe_models.model_types())
def test_names_say_what_transformers_says(model_type, tmp_path):
    """Families of the table are stacked by their names: as by transformers' mapping."""
    save(model_type, tmp_path / "model")
    with loraformat.open_model(tmp_path / "model") as checkpoint:
        found = expert_stacks._by_name(checkpoint)
        if not family_of(parse(checkpoint.config)).expert_leaves or model_type in IRREGULAR:
            assert found is None
        else:
            assert found == expert_stacks._by_mapping(checkpoint)


@pytest.mark.parametrize("model_type", ["mixtral", "phimoe"])
def test_without_transformers(model_type, tmp_path, monkeypatch):
    """The same bundle, or the command that leads to it: never another one without a word."""
    save(model_type, tmp_path / "model")
    convert(tmp_path / "model", tmp_path / "wanted")
    monkeypatch.setattr(expert_stacks, "find_spec", lambda name: None)
    monkeypatch.setattr(expert_stacks, "names_of", None)
    if model_type == "phimoe":
        with pytest.raises(MissingDependencyError, match="loraformat\\[train\\]") as refused:
            convert(tmp_path / "model", tmp_path / "found")
        assert "--skip '*.experts.*'" in refused.value.hint
        convert(tmp_path / "model", tmp_path / "found", skip=["*.experts.*"])
    else:
        convert(tmp_path / "model", tmp_path / "found")
        one, other = (
            load_file(next((tmp_path / p).glob("*.safetensors"))) for p in ("wanted", "found")
        )
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    bundle = tmp_path / "wanted"
    with pytest.raises(MissingDependencyError, match="--experts fused"):
        convert(bundle, tmp_path / "each", to_format="bitsandbytes", experts="each")
    convert(bundle, tmp_path / "fused", to_format="bitsandbytes", experts="fused")


#: Tensors that are taken away of a model with 4 experts in each of two layers, and what is said.
BROKEN = {
    "a projection of one expert": (r"layers.1.*experts.2.up_proj", "are missing"),
    "a whole expert": (r"layers.1.*experts.3\.", "3 experts with 192 rows of 32 in all"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_missing_experts_are_named(case, tmp_path):
    pattern, said = BROKEN[case]
    save("qwen3_moe", tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    kept = {name: t for name, t in load_file(path).items() if not re.search(pattern, name)}
    save_file(kept, path, {"format": "pt"})
    with pytest.raises(InputError, match=said) as refused:
        convert(tmp_path / "model", tmp_path / "bundle")
    assert "parameter model.layers.1.mlp.experts." in refused.value.problem
    assert not (tmp_path / "bundle").exists()
    assert convert(tmp_path / "model", tmp_path / "dense", to_format="safetensors")


def test_experts_of_another_size_are_named(tmp_path):
    save("qwen3_moe", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config |= dict.fromkeys(config.keys() & {"num_experts", "num_local_experts"}, 8)
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"4 experts .* the config says 8 of"):
        convert(tmp_path / "model", tmp_path / "bundle")
