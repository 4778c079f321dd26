"""compressed-tensors: decoded as its own decompressors do, in every form it publishes."""

import json

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.quantization import QuantizationScheme
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from loraformat import plugins
from loraformat.errors import InputError, UnsupportedError
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


def form(format, *, bits, kind="int", strategy="group", group=None, symmetric=True, **more):
    """A form by its settings; ``scale`` makes the dtype of scales."""
    weights = {"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": symmetric, **more}
    if group:
        weights["group_size"] = group
    scheme = {"targets": ["Linear"], "weights": weights, "format": format}
    if format in ("int-quantized", "float-quantized"):
        scheme["input_activations"] = {"num_bits": bits, "type": kind, "dynamic": True,
                                       "strategy": "token", "symmetric": True}  # fmt: skip
    return scheme


FORMS = {
    "W4A16": form("pack-quantized", bits=4, group=32),
    "W4A16 asymmetric": form("pack-quantized", bits=4, group=32, symmetric=False),
    "W4A16 by channel": form("pack-quantized", bits=4, strategy="channel"),
    "W8A16": form("pack-quantized", bits=8, group=64),
    "W8A16 asymmetric by channel": form(
        "pack-quantized", bits=8, strategy="channel", symmetric=False),
    "W3A16": form("pack-quantized", bits=3, group=32),
    "W3A16 asymmetric": form("pack-quantized", bits=3, group=32, symmetric=False),
    "W2A16": form("pack-quantized", bits=2, group=16),
    "W8A8": form("int-quantized", bits=8, strategy="channel"),
    "W8A8 by tensor": form("int-quantized", bits=8, strategy="tensor"),
    "W8A8 asymmetric": form("int-quantized", bits=8, strategy="channel", symmetric=False),
    "W8 by group": form("naive-quantized", bits=8, group=32),
    "FP8 by channel": form("float-quantized", bits=8, kind="float", strategy="channel"),
    "FP8 by tensor": form("float-quantized", bits=8, kind="float", strategy="tensor"),
    "FP8 in blocks": form(
        "float-quantized", bits=8, kind="float", strategy="block", block_structure=[32, 16]),
    "FP8 by group": form("naive-quantized", bits=8, kind="float", group=32),
    "MXFP8": form("mxfp8-quantized", bits=8, kind="float", group=32, scale_dtype="torch.uint8"),
    "NVFP4": form("nvfp4-pack-quantized", bits=4, kind="float", strategy="tensor_group", group=16),
    "MXFP4": form("mxfp4-pack-quantized", bits=4, kind="float", group=32,
                  scale_dtype="torch.uint8"),
}  # fmt: skip
NAMES = {"W2": "int2", "W3": "int3", "W4": "int4", "W8": "int8", "FP": "float8 E4M3",
         "MXFP8": "float8 E4M3", "NVFP4": "NVFP4", "MXFP4": "MXFP4"}  # fmt: skip


def settings(*schemes, **more):
    formats = {scheme["format"] for scheme in schemes}
    return {
        "quant_method": "compressed-tensors", "quantization_status": "compressed",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "config_groups": {f"group_{n}": scheme for n, scheme in enumerate(schemes)},
        "ignore": ["lm_head"], **more,
    }  # fmt: skip


def scale_of(weight, scheme, dtype):
    """Scales and zero points of the form's shape, by the range of the weight's values."""
    weights = scheme["weights"]
    rows, columns = weight.shape
    high, wide = weights.get("block_structure") or {
        "tensor": (rows, columns), "channel": (1, columns),
    }.get(weights["strategy"], (1, weights.get("group_size")))  # fmt: skip
    blocks = weight.float().reshape(rows // high, high, columns // wide, wide)
    low, top = blocks.amin((1, 3)), blocks.amax((1, 3))
    largest = {(8, "float"): 448.0, (4, "float"): 6.0}.get(
        (weights["num_bits"], weights["type"]), 2.0 ** (weights["num_bits"] - 1) - 1
    )
    if weights["strategy"] == "tensor":
        low, top = low.reshape(1), top.reshape(1)
    if weights["symmetric"]:
        return (torch.maximum(-low, top) / largest).to(dtype), None
    half = 2 ** (weights["num_bits"] - 1)
    scale = ((top - low) / (2 * half - 1)).to(dtype)
    return scale, (-half - low / scale.float()).round().clamp(-half, half - 1).to(torch.int8)


def float4(rows, columns, group):
    """Return parts of NVFP4 or MXFP4 by chance: compressing starts a compiler, which takes long."""
    parts = {"weight_packed": torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8)}
    shape = rows, columns // group
    if group == 32:
        return {**parts, "weight_scale": torch.randint(110, 130, shape, dtype=torch.uint8)}
    scale = (torch.rand(shape) * 400 + 1).to(torch.float8_e4m3fn)
    return {**parts, "weight_scale": scale, "weight_global_scale": torch.rand(1) * 1000 + 500}


def parts_of(scheme, dtype=torch.bfloat16):
    """Return a function that compresses one weight as the library does."""
    compressor = BaseCompressor.get_value_from_registry(scheme["format"])
    parsed = QuantizationScheme.model_validate(scheme)

    def compress(weight):
        if scheme["weights"]["num_bits"] == 4 and scheme["weights"]["type"] == "float":
            return float4(*weight.shape, scheme["weights"]["group_size"])
        scale, zero = scale_of(weight, scheme, dtype)
        state = {"weight": weight.to(dtype), "weight_scale": scale}
        if zero is not None:
            state["weight_zero_point"] = zero
        return compressor.compress(state, parsed)

    return compress


def decompressed(scheme, modules):
    """Return the weights as the library decompresses them."""
    compressor = BaseCompressor.get_value_from_registry(scheme["format"])
    parsed = QuantizationScheme.model_validate(scheme)
    return {
        f"{owner}.weight": compressor.decompress(parts, parsed)["weight"].contiguous()
        for owner, parts in modules.items()
    }


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("name", FORMS)
def test_what_the_library_decompresses(models, tmp_path, name):
    scheme = FORMS[name]
    modules = quantize(models / "llama", tmp_path / "m", parts_of(scheme), settings(scheme))
    assert plugins.sniff(tmp_path / "m").name == "compressed-tensors"
    named = NAMES.get(name, NAMES.get(name[:2]))
    wanted = decompressed(scheme, modules)
    check_conversions(tmp_path / "m", wanted, tmp_path, count=7, named=named)


def test_half_precision_stays_half_precision(models, tmp_path):
    """The library decodes to the type of the scales."""
    scheme = FORMS["W4A16 asymmetric"]
    parts = parts_of(scheme, torch.float16)
    modules = quantize(models / "llama", tmp_path / "m", parts, settings(scheme))
    wanted = decompressed(scheme, modules)
    assert wanted[f"{Q}.weight"].dtype == torch.float16
    check_conversions(tmp_path / "m", wanted, tmp_path, count=7, named="int4")


@pytest.mark.parametrize("name", ["W4A16", "NVFP4"])
def test_experts_of_four_bits_beside_float8(models, tmp_path, name):
    """As Kimi K2 is published: forms are mixed, and one model's config is a part of another's."""
    experts, attention = FORMS[name], FORMS["FP8 by channel"]
    forms = {"experts": (experts, 12), "self_attn": (attention, 4)}
    wanted, types = {}, {}
    source = models / "moe"
    for place, (scheme, count) in forms.items():
        target = tmp_path / place
        modules = quantize(
            source, target, parts_of(scheme), settings(*(one for one, _ in forms.values())),
            lambda weight, place=place: place in weight and "proj.weight" in weight,
        )  # fmt: skip
        assert len(modules) == count
        wanted |= decompressed(scheme, modules)
        types[NAMES.get(name if place == "experts" else "FP", "int4")] = count
        source = target
    convert(source, tmp_path / "plain", to_format="safetensors")
    found = load_file(tmp_path / "plain/model.safetensors")
    assert found.keys() == load_file(models / "moe/model.safetensors").keys()
    assert all(torch.equal(found[weight], wanted[weight]) for weight in wanted)
    report = convert(source, tmp_path / "bundle")
    assert [step.types for step in report.quantized_before] == [types]
    convert(source, tmp_path / "model.gguf", dtype="bf16")
    convert(tmp_path / "plain", tmp_path / "dense.gguf", dtype="bf16")
    assert loaded(tmp_path / "model.gguf") == loaded(tmp_path / "dense.gguf")


def test_a_tied_head_stays_tied(models, tmp_path):
    scheme = FORMS["W4A16"]
    modules = quantize(models / "tied", tmp_path / "m", parts_of(scheme), settings(scheme))
    wanted = decompressed(scheme, modules)
    check_conversions(tmp_path / "m", wanted, tmp_path, count=7, named="int4")
    assert "lm_head.weight" not in load_file(tmp_path / "plain/model.safetensors")


def test_what_transformers_loads(models, tmp_path):
    scheme = FORMS["W4A16"]
    quantize(models / "llama", tmp_path / "m", parts_of(scheme), settings(scheme))
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "m", quantization_config=CompressedTensorsConfig(dequantize=True),
        dtype=torch.bfloat16,
    )  # fmt: skip
    convert(tmp_path / "m", tmp_path / "plain", to_format="safetensors")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    ids = torch.arange(10)[None]
    assert torch.equal(opened(ids).logits, model(ids).logits)


def test_columns_that_were_ordered_by_activations(models, tmp_path):
    """``weight_g_idx`` says each column's group; versions until 2026 wrote it."""
    scheme = FORMS["W4A16 asymmetric"]
    shuffled = torch.arange(64).reshape(2, 32).T.reshape(-1) // 32

    def parts(weight, order):
        made = parts_of(scheme)(weight)
        return {**made, "weight_g_idx": order} if weight.shape[1] == 64 else made

    convert_to = {}
    for name, order in {"none": torch.full((64,), -1), "some": shuffled}.items():
        modules = quantize(
            models / "llama", tmp_path / name,
            lambda weight, order=order: parts(weight, order.to(torch.int32)), settings(scheme),
        )  # fmt: skip
        convert(tmp_path / name, tmp_path / f"{name}-plain", to_format="safetensors")
        convert_to[name] = load_file(tmp_path / f"{name}-plain/model.safetensors")[f"{Q}.weight"]
    assert torch.equal(convert_to["none"], decompressed(scheme, modules)[f"{Q}.weight"])
    state = modules[Q]
    inverse = torch.argsort(shuffled, stable=True)
    codes = unpack_from_int32(state["weight_packed"], 4, torch.Size([64, 64])).float()
    zeros = unpack_from_int32(state["weight_zero_point"], 4, torch.Size([64, 2]), packed_dim=0)
    ordered = (codes[:, inverse].reshape(64, 2, 32) - zeros.float()[..., None]) * state[
        "weight_scale"
    ].float()[..., None]
    wanted = ordered.reshape(64, 64)[:, torch.argsort(inverse)].bfloat16()
    assert torch.equal(convert_to["some"], wanted)
    bad = change(tmp_path / "some", lambda t: t[f"{Q}.weight_g_idx"].fill_(2))
    with pytest.raises(InputError, match=r"weight_g_idx names groups beyond the 2"):
        convert(bad, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_some_rows_are_those_of_the_whole(models, tmp_path):
    """Zero points of three bits begin in the middle of a byte."""
    scheme = FORMS["W3A16 asymmetric"]
    quantize(models / "llama", tmp_path / "m", parts_of(scheme), settings(scheme))
    with plugins.sniff(tmp_path / "m").read(tmp_path / "m", plugins.ReadOptions()) as model:
        tensor = model.tensors[f"{Q}.weight"]
        whole = tensor.array()
        for start, stop in [(0, 1), (5, 7), (31, 34), (63, 64), (10, 10)]:
            assert tensor.rows(start, stop).tobytes() == whole[start:stop].tobytes()


def test_a_block_as_older_versions_spell_it(models, tmp_path):
    scheme = FORMS["FP8 in blocks"]
    modules = quantize(models / "llama", tmp_path / "m", parts_of(scheme), settings(scheme))
    spelled = {**scheme, "weights": {**scheme["weights"], "block_structure": "32x16"}}
    change(tmp_path / "m", config_groups={"group_0": spelled})
    convert(tmp_path / "m", tmp_path / "plain", to_format="safetensors")
    found = load_file(tmp_path / "plain/model.safetensors")[f"{Q}.weight"]
    assert torch.equal(found, decompressed(scheme, modules)[f"{Q}.weight"])
    wrong = {**scheme, "weights": {**scheme["weights"], "block_structure": "32"}}
    change(tmp_path / "m", config_groups={"group_0": wrong})
    check_refused(tmp_path / "m", tmp_path / "out", "wanted two sizes")


@pytest.mark.parametrize("place", ["compression_config", "text_config"])
def test_settings_in_other_places(models, tmp_path, place):
    scheme = FORMS["FP8 in blocks"]
    quantize(models / "llama", tmp_path / "m", parts_of(scheme), settings(scheme))
    path = tmp_path / "m/config.json"
    config = json.loads(path.read_text())
    said = config.pop("quantization_config")
    config[place] = said if place == "compression_config" else {"quantization_config": said}
    path.write_text(json.dumps(config))
    convert(tmp_path / "m", tmp_path / "plain", to_format="safetensors")
    assert "quant_method" not in (tmp_path / "plain/config.json").read_text()


def weights(**more):
    return {"config_groups": {"group_0": {**FORMS["W4A16"], "weights": more}}}


def added(suffix, tensor):
    return lambda tensors: tensors.update({f"{Q}.{suffix}": tensor})


BAD = {
    "no scale": ("W4A16", without("weight_scale"), {}, "weight_scale is missing"),
    "no shape": ("W4A16", without("weight_shape"), {}, "weight_shape is missing"),
    "no zero point": ("W4A16 asymmetric", without("weight_zero_point"), {}, "is missing"),
    "no global scale": ("NVFP4", without("weight_global_scale"), {}, "global_scale is missing"),
    "no scale of int8": ("W8A8", without("weight_scale"), {}, "weight_scale is missing"),
    "no scale of float8": ("FP8 by channel", without("weight_scale"), {}, "is missing"),
    "another shape": (
        "W4A16", replaced("weight_shape", lambda t: t * 2), {}, r"a weight of shape \[128, 128\]"),
    "no shape at all": (
        "W4A16", replaced("weight_shape", lambda t: -t), {}, r"a weight of shape \[-64, -64\]"),
    "fewer words": ("W4A16", replaced("weight_packed", lambda t: t[:, :-1]), {}, "of 4 bits"),
    "too many dimensions": ("W4A16", replaced("weight_packed", lambda t: t[None]), {}, "4 bits"),
    "words of another type": (
        "W4A16", replaced("weight_packed", lambda t: t.long()), {}, "of 4 bits"),
    "fewer scales": ("W4A16", replaced("weight_scale", lambda t: t[:-1]), {}, "scale for each"),
    "scales of another type": (
        "W4A16", replaced("weight_scale", lambda t: t.double()), {}, "wanted F32 or BF16 or F16"),
    "a group that does not divide": (
        "W4A16", replaced("weight_scale", lambda t: t.repeat(1, 3)[:, :5]), {}, "32 columns"),
    "another group than the config's": ("W4A16", None, weights(num_bits=4, group_size=16), "16 co"),
    "another number of bits": ("W4A16", None, weights(num_bits=5), "5 bits"),
    "nine bits": ("W4A16", None, weights(num_bits=9), "9 bits"),
    "bits that are none": ("W4A16", None, weights(num_bits="4"), "4 bits"),
    "fewer zero points": (
        "W4A16 asymmetric", replaced("weight_zero_point", lambda t: t[:-1]), {}, "zero_point is"),
    "zero points of int8": (
        "W8A8 asymmetric", replaced("weight_zero_point", lambda t: t[:-1]), {}, "zero_point is"),
    "another block": (
        "FP8 in blocks", replaced("weight_scale", lambda t: t[:-1, :-1]), {}, "scales no weight"),
    "NVFP4 in other groups": (
        "NVFP4", replaced("weight_scale", lambda t: t[:, ::2]), {}, "columns / 16"),
    "MXFP6": (
        "MXFP4", replaced("weight_packed", lambda t: torch.cat([t, t[:, ::2]], 1)), {}, "MXFP4"),
    "both forms": (
        "W4A16", added("weight", torch.ones(64, 64)), {}, "holds one weight twice"),
    "more than is known": (
        "W4A16", added("weight_lut", torch.ones(16)), {}, "weight_lut belongs to a quantized"),
    "weights that are not quantized yet": (
        "W8A8", replaced("weight", lambda t: t.bfloat16()), {}, "has a scale, but is BF16"),
    "rotated weights": (
        "W4A16", None, {"transform_config": {"config_groups": {"u": {}}}}, "transform_config"),
    "sparse weights": (
        "W8A8", None, {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24-bitmask"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", BAD)
def test_wrong_input_is_refused(models, tmp_path, wrong):
    name, edit, more, said = BAD[wrong]
    scheme = FORMS[name]
    quantize(models / "llama", tmp_path / "m", parts_of(scheme), settings(scheme))
    change(tmp_path / "m", edit, **more)
    check_refused(tmp_path / "m", tmp_path / "out", said)


def test_scales_of_activations_stay_behind(models, tmp_path):
    scheme = FORMS["NVFP4"]
    quantize(models / "llama", tmp_path / "m", parts_of(scheme), settings(scheme))
    change(tmp_path / "m", added("input_global_scale", torch.ones(1)))
    with plugins.sniff(tmp_path / "m").read(tmp_path / "m", plugins.ReadOptions()) as model:
        assert any("1 scales of activations" in said for said in model.left_behind)
        assert f"{Q}.input_global_scale" not in model.tensors


def test_a_config_alone_quantizes_nothing(models, tmp_path):
    scheme = FORMS["W4A16"]
    quantize(models / "llama", tmp_path / "m", None, settings(scheme), lambda name: False)
    with pytest.raises(UnsupportedError, match="holds no such weights") as refused:
        convert(tmp_path / "m", tmp_path / "out")
    assert "remove quantization_config" in refused.value.hint
    config = json.loads((tmp_path / "m/config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "m/config.json").write_text(json.dumps(config))
    assert convert(tmp_path / "m", tmp_path / "out").source_format == "safetensors"


def test_float8_without_a_config_is_read_all_the_same(models, tmp_path):
    scheme = FORMS["FP8 by channel"]
    modules = quantize(models / "llama", tmp_path / "m", parts_of(scheme), settings(scheme))
    config = json.loads((tmp_path / "m/config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "m/config.json").write_text(json.dumps(config))
    report = convert(tmp_path / "m", tmp_path / "plain", to_format="safetensors")
    assert report.source_format == "float8"
    found = load_file(tmp_path / "plain/model.safetensors")
    wanted = decompressed(scheme, modules)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_a_single_number(models, tmp_path, dtype):
    scheme = FORMS["FP8 by tensor"]
    quantize(models / "llama", tmp_path / "m", None, settings(scheme), lambda name: False)
    parts = {f"{Q}.weight": torch.tensor(3.0).to(dtype), f"{Q}.weight_scale": torch.tensor(0.5)}
    change(tmp_path / "m", lambda tensors: tensors.update(parts))
    with plugins.sniff(tmp_path / "m").read(tmp_path / "m", plugins.ReadOptions()) as model:
        assert float(model.tensors[f"{Q}.weight"].array()) == 1.5
