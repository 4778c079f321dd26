"""NVIDIA's modelopt: its published arithmetic, in every form it exports, and vLLM's for NVFP4."""

import json

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.entrypoints.convert.converters import ModelOptNvfp4Converter
from compressed_tensors.quantization import QuantizationScheme

from loraformat import plugins
from loraformat.errors import InputError
from loraformat.ops.convert.convert import convert
from tests.converters.quantized_models import (
    Q,
    change,
    check_conversions,
    check_refused,
    loaded,
    make_models,
    quantize,
    replaced,
    without,
)
from tests.torch_tensors import numbers

LEVELS = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
E4M3 = torch.float8_e4m3fn


def levels(packed):
    """The numbers of two codes in a byte, along the last dimension."""
    both = torch.stack([packed & 15, packed >> 4], -1).flatten(-2)
    return LEVELS[both.long()]


def nvfp4(weight):
    rows, columns = weight.shape
    return {
        "weight": torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8),
        "weight_scale": (torch.rand(rows, columns // 16) * 400 + 1).to(E4M3),
        "weight_scale_2": torch.rand(()) / 1000,
        "input_scale": torch.rand(()),
    }


def decode_nvfp4(parts):
    """``NVFP4QTensor.dequantize``: scales are multiplied first, in float32."""
    scale = parts["weight_scale"].float() * parts["weight_scale_2"]
    return levels(parts["weight"]) * scale.repeat_interleave(16, 1)


def mxfp4(weight):
    rows, columns = weight.shape
    return {
        "weight": torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8),
        "weight_scale": torch.randint(110, 130, (rows, columns // 32), dtype=torch.uint8),
    }


def decode_mxfp4(parts):
    scale = 2.0 ** (parts["weight_scale"].float() - 127)
    return levels(parts["weight"]) * scale.repeat_interleave(32, 1)


def float8(weight):
    scale = weight.float().abs().max() / 448
    return {"weight": (weight.float() / scale).to(E4M3), "weight_scale": scale,
            "input_scale": torch.ones(())}  # fmt: skip


def float8_rows(weight):
    scale = weight.float().abs().amax(1) / 448
    return {"weight": (weight.float() / scale[:, None]).to(E4M3), "weight_scale": scale}


def decode_float8(parts):
    scale = parts["weight_scale"]
    return parts["weight"].float() * (scale[:, None] if scale.ndim else scale)


def int8(weight):
    scale = weight.float().abs().amax(1) / 127
    return {"weight": (weight.float() / scale[:, None]).round().to(torch.int8),
            "weight_scale": scale}  # fmt: skip


def smoothed(make):
    """What AWQ adds: a factor for each input."""
    return lambda weight: {
        **make(weight),
        "pre_quant_scale": (torch.rand(weight.shape[1]) + 0.5).bfloat16(),
    }


def int4(weight):
    rows, columns = weight.shape
    return {
        "weight": torch.randint(0, 256, (rows // 2, columns), dtype=torch.uint8),
        "weight_scale": torch.rand(rows, columns // 32),
    }


def decode_int4(parts):
    packed = parts["weight"].int()
    codes = torch.stack([packed & 15, packed >> 4], 1).flatten(0, 1)
    codes = codes - 16 * (codes > 7)
    return codes.float() * parts["weight_scale"].repeat_interleave(32, 1)


FORMS = {
    "NVFP4": (nvfp4, decode_nvfp4, "NVFP4"),
    "NVFP4_AWQ": (smoothed(nvfp4), decode_nvfp4, "NVFP4"),
    "MXFP4": (mxfp4, decode_mxfp4, "MXFP4"),
    "FP8": (float8, decode_float8, "float8 E4M3"),
    "FP8_PER_CHANNEL": (float8_rows, decode_float8, "float8 E4M3"),
    "W8A8_SQ": (smoothed(int8), decode_float8, "int8"),
    "W4A16_AWQ": (smoothed(int4), decode_int4, "int4"),
}
SETTINGS = {"quant_method": "modelopt", "ignore": ["lm_head"]}


def wanted_of(modules, decode):
    return {
        f"{owner}.weight": (decode(parts) * parts.get("pre_quant_scale", torch.ones(1)).float())
        .bfloat16().contiguous()
        for owner, parts in modules.items()
    }  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("form", FORMS)
def test_every_form(models, tmp_path, form):
    make, decode, named = FORMS[form]
    settings = {**SETTINGS, "quant_algo": form}
    modules = quantize(models / "llama", tmp_path / "m", make, settings)
    assert plugins.sniff(tmp_path / "m").name == "modelopt"
    check_conversions(tmp_path / "m", wanted_of(modules, decode), tmp_path, count=7, named=named)


def test_what_compressed_tensors_makes_of_it(models, tmp_path):
    """It inverts the second scale, so that some numbers are one step of BF16 away."""
    modules = quantize(models / "llama", tmp_path / "m", nvfp4, SETTINGS)
    scheme = QuantizationScheme.model_validate({
        "targets": ["Linear"], "format": "nvfp4-pack-quantized",
        "weights": {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
    })  # fmt: skip
    compressor = BaseCompressor.get_value_from_registry("nvfp4-pack-quantized")
    with plugins.sniff(tmp_path / "m").read(tmp_path / "m", plugins.ReadOptions()) as model:
        for owner, parts in modules.items():
            stored = {f"{owner}.{name}": part for name, part in parts.items()}
            ModelOptNvfp4Converter(targets=["re:.*proj$"]).process(stored)
            local = {name.rpartition(".")[2]: part for name, part in stored.items()}
            local["weight_global_scale"] = local["weight_global_scale"].reshape(1)
            theirs = compressor.decompress(local, scheme)["weight"]
            ours = numbers(model.tensors[f"{owner}.weight"]).clone()
            steps = (ours.view(torch.int16).int() - theirs.view(torch.int16).int()).abs()
            assert int(steps.max()) <= 1
            assert float((steps > 0).float().mean()) < 0.01


def test_experts_in_nvfp4_beside_float8(models, tmp_path):
    settings = {**SETTINGS, "quant_algo": "MIXED_PRECISION"}
    wanted, source = {}, models / "moe"
    for place, (make, decode) in {
        "experts": (nvfp4, decode_nvfp4), "self_attn": (float8, decode_float8),
    }.items():  # fmt: skip
        modules = quantize(
            source, tmp_path / place, make, settings,
            lambda name, place=place: place in name and "proj.weight" in name,
        )  # fmt: skip
        wanted |= wanted_of(modules, decode)
        source = tmp_path / place
    assert len(wanted) == 16
    with plugins.sniff(source).read(source, plugins.ReadOptions()) as model:
        for name, weight in wanted.items():
            assert torch.equal(numbers(model.tensors[name]), weight)
    convert(source, tmp_path / "plain", to_format="safetensors")
    convert(source, tmp_path / "model.gguf", dtype="bf16")
    convert(tmp_path / "plain", tmp_path / "dense.gguf", dtype="bf16")
    assert loaded(tmp_path / "model.gguf") == loaded(tmp_path / "dense.gguf")
    report = convert(source, tmp_path / "bundle")
    assert [step.types for step in report.quantized_before] == [{"NVFP4": 12, "float8 E4M3": 4}]


@pytest.mark.parametrize("seconds", [(), (1,), (3,)])
def test_stacks_of_experts_are_packed_along_their_input(models, tmp_path, seconds):
    """As of Llama 4, whose class stores them as (experts, in, out)."""
    name = "model.layers.0.feed_forward.experts.gate_up_proj"
    parts = {
        "": torch.randint(0, 256, (3, 24, 20), dtype=torch.uint8),
        "_weight_scale": (torch.rand(3, 3, 20) * 400 + 1).to(E4M3),
        "_weight_scale_2": torch.rand(seconds) / 1000,
    }
    quantize(models / "llama", tmp_path / "m", None, SETTINGS, lambda name: False)
    change(tmp_path / "m", lambda tensors: tensors.update({name + k: t for k, t in parts.items()}))
    scale = parts["_weight_scale"].float() * parts["_weight_scale_2"].reshape(-1, 1, 1)
    turned = levels(parts[""].transpose(1, 2)).transpose(1, 2)
    wanted = (turned * scale.repeat_interleave(16, 1)).bfloat16()
    with plugins.sniff(tmp_path / "m").read(tmp_path / "m", plugins.ReadOptions()) as model:
        tensor = model.tensors[name]
        assert torch.equal(numbers(tensor), wanted)
        whole = tensor.array().reshape(-1, 20)
        for start, stop in [(0, 1), (47, 49), (7, 100), (144, 144)]:
            assert tensor.rows(start, stop).tobytes() == whole[start:stop].tobytes()
    bad = change(tmp_path / "m", lambda t: t.update({name + "_weight_scale_2": torch.rand(2)}))
    with pytest.raises(InputError, match=r"wanted U8 \(experts, in / 2, out\)"):
        convert(bad, tmp_path / "out", to_format="safetensors")


def test_its_own_settings_stay_behind(models, tmp_path):
    """vLLM would take ``hf_quant_config.json`` for a model that is still quantized."""
    quantize(models / "llama", tmp_path / "m", nvfp4, SETTINGS)
    path = tmp_path / "m/config.json"
    config = json.loads(path.read_text())
    del config["quantization_config"]
    path.write_text(json.dumps(config))
    said = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4"}}
    (tmp_path / "m/hf_quant_config.json").write_text(json.dumps(said))
    convert(tmp_path / "m", tmp_path / "plain", to_format="safetensors")
    assert not (tmp_path / "plain/hf_quant_config.json").exists()
    (tmp_path / "m/hf_quant_config.json").write_text("[")
    with pytest.raises(InputError, match=r"hf_quant_config\.json: not JSON"):
        convert(tmp_path / "m", tmp_path / "out", to_format="safetensors")


def test_what_is_said_of_the_cache_stays_behind(models, tmp_path):
    quantize(models / "llama", tmp_path / "m", nvfp4, SETTINGS)
    names = [Q.replace("q_proj", name) for name in ("k_proj.k_scale", "v_proj.v_bias")]
    change(tmp_path / "m", lambda tensors: tensors.update({n: torch.ones(()) for n in names}))
    with plugins.sniff(tmp_path / "m").read(tmp_path / "m", plugins.ReadOptions()) as model:
        assert not set(names) & set(model.tensors)
        assert any("9 scales of activations" in said for said in model.left_behind)


BAD = {
    "no scale": ("NVFP4", without("weight_scale"), "weight_scale is missing"),
    "no second scale": ("NVFP4", without("weight_scale_2"), "weight_scale_2 is missing"),
    "two second scales": (
        "NVFP4", replaced("weight_scale_2", lambda t: t.repeat(2)), r"and F32 \[2\], wanted"),
    "another group": ("NVFP4", replaced("weight_scale", lambda t: t[:, ::2]), "columns / 16"),
    "a vector": ("NVFP4", replaced("weight", lambda t: t.flatten()), "wanted U8"),
    "a vector with one scale": (
        "MXFP4", lambda t: t.update({
            f"{Q}.weight": torch.zeros(32, dtype=torch.uint8),
            f"{Q}.weight_scale": torch.zeros((), dtype=torch.uint8)}), "wanted U8"),
    "a number": ("NVFP4", replaced("weight", lambda t: t[0, 0]), "wanted U8"),
    "scales of float8": ("FP8", replaced("weight_scale", lambda t: t.double()), "wanted F32"),
    "float8 without scale": ("FP8", without("weight_scale"), "weight_scale is missing"),
    "scales by group": (
        "W8A8_SQ", replaced("weight_scale", lambda t: t[:, None].repeat(1, 3)), "scales no weight"),
    "a factor less": (
        "W8A8_SQ", replaced("pre_quant_scale", lambda t: t[:-1]), "pre_quant_scale is BF16"),
    "rows that are odd": ("W4A16_AWQ", replaced("weight_scale", lambda t: t[:-1]), r"U8 \(out / 2"),
    "groups that do not divide": (
        "W4A16_AWQ", replaced("weight_scale", lambda t: t.repeat(1, 3)[:, :5]), r"U8 \(out / 2"),
    "a part of SVDQuant": (
        "NVFP4",
        lambda t: t.update({f"{Q}.weight_quantizer.svdquant_lora_a": torch.ones(4, 64)}),
        "svdquant_lora_a belongs to a quantized weight",
    ),
}  # fmt: skip


@pytest.mark.parametrize("wrong", BAD)
def test_wrong_input_is_refused(models, tmp_path, wrong):
    form, edit, said = BAD[wrong]
    quantize(models / "llama", tmp_path / "m", FORMS[form][0], SETTINGS)
    change(tmp_path / "m", edit)
    check_refused(tmp_path / "m", tmp_path / "out", said, from_format="modelopt")
