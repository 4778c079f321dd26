"""float8 checkpoints: decoded as transformers decodes them, in every form of scales."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, LlamaConfig, LlamaForCausalLM
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from loraformat import plugins
from loraformat.errors import FormatError, InputError, UnsupportedError, UsageError
from loraformat.ops.convert.convert import convert
from loraformat.ops.opening.model import open_model
from loraformat.tensors.header import parse_header
from tests.torch_tensors import numbers

E4M3, E5M2, E8M0 = torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu
W = "model.layers.0.mlp.up_proj.weight"
EXPERT = W.replace("mlp", "ffn.experts.0")
BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}


def write(path, tensors, **config):
    path.mkdir()
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    return path


def gauss(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def decoded(path, name=W):
    with open_model(path) as model:
        tensor = model.tensors[name]
        return numbers(tensor).clone(), tensor


def exponents(scale):
    """The powers of two not below some scales, as bytes."""
    return (scale.log2().ceil() + 127).to(torch.uint8)


#: By form: the scale as it is stored, from its numbers, and its name in place of ``weight``.
STORED = {
    "numbers": (lambda scale: scale, "weight_scale_inv", {}),
    "UE8M0": (lambda scale: exponents(scale).view(E8M0), "weight_scale_inv", {}),
    "UE8M0 in bytes": (exponents, "weight_scale_inv", {"scale_fmt": "ue8m0"}),
    "as in DeepSeek-V4": (
        lambda scale: exponents(scale).view(E8M0), "scale", {"scale_fmt": "ue8m0"}),
    "as in Mistral Large 4": (lambda scale: scale, "qscale_weight", {}),
}  # fmt: skip


@pytest.mark.parametrize("form", STORED)
@pytest.mark.parametrize("block", [(128, 128), (1, 32)])
def test_what_transformers_decodes(tmp_path, form, block):
    """A model of 128 x 128 blocks, as DeepSeek and Qwen publish them, and of MXFP8's."""
    store, called, settings = STORED[form]
    settings = {**BLOCKS, **settings}
    if block != (128, 128):
        if form not in ("UE8M0", "UE8M0 in bytes"):
            block = (64, 64)
        settings["weight_block_size"] = list(block)
    torch.manual_seed(0)
    sizes = LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, vocab_size=256,
    )  # fmt: skip
    LlamaForCausalLM(sizes).bfloat16().save_pretrained(tmp_path / "dense")
    stored = {}
    for name, weight in load_file(tmp_path / "dense/model.safetensors").items():
        if not name.endswith("_proj.weight"):
            stored[name] = weight
            continue
        rows, columns = weight.shape
        high, wide = block
        blocks = weight.float().reshape(rows // high, high, columns // wide, wide)
        scale = blocks.abs().amax((1, 3)) / 448
        stored[name] = (blocks / scale[:, None, :, None]).reshape(rows, columns).to(E4M3)
        stored[name.removesuffix("weight") + called] = store(scale)
    config = json.loads((tmp_path / "dense/config.json").read_text())
    write(tmp_path / "float8", stored, **config, quantization_config=settings)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "float8", quantization_config=FineGrainedFP8Config(dequantize=True),
        dtype=torch.bfloat16,
    )  # fmt: skip
    report = convert(tmp_path / "float8", tmp_path / "plain", to_format="safetensors")
    assert report.source_format == "float8"
    found = load_file(tmp_path / "plain/model.safetensors")
    wanted = model.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in found)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")  # no trace of float8 is left
    ids = torch.arange(10)[None]
    assert torch.equal(opened(ids).logits, model(ids).logits)
    report = convert(tmp_path / "float8", tmp_path / "bundle")
    assert report.quantized == 14
    assert any("float8 E4M3 (14 weights" in note for note in report.notes), "quantized twice"


SCALES = {
    "tensor": ((64, 96), ()),
    "tensor of one": ((64, 96), (1,)),
    "rows": ((64, 96), (64,)),
    "rows of one": ((64, 96), (64, 1)),
    "ragged blocks": ((200, 300), (2, 3)),
    "one block": ((64, 96), (1, 1)),
    "experts": ((3, 200, 300), (3, 2, 3)),
    "experts by row": ((3, 64, 96), (3, 64, 1)),
    "experts by column": ((3, 64, 96), (3, 1, 96)),
    "experts each": ((3, 64, 96), (3, 1, 1)),
}


@pytest.mark.parametrize("suffix", ["_scale_inv", "_scale"])
@pytest.mark.parametrize("code", [E4M3, E5M2])
@pytest.mark.parametrize("form", SCALES)
def test_every_form_of_scales(tmp_path, form, code, suffix):
    shape, scaled = SCALES[form]
    codes = (gauss(*shape) * 40).to(code)
    scale = gauss(*scaled, seed=1).abs() + 0.01
    path = write(tmp_path / "m", {W: codes, W + suffix: scale}, quantization_config=BLOCKS)
    full = scale.reshape(*scaled, 1) if form == "rows" else scale
    for dimension, count in enumerate(shape):
        if full.ndim == len(shape) and full.shape[dimension] not in (1, count):
            full = full.repeat_interleave(128, dimension).narrow(dimension, 0, count)
    found, tensor = decoded(path)
    assert torch.equal(found, (codes.float() * full).bfloat16())
    assert tensor.stored_as == f"float8 {'E4M3' if code is E4M3 else 'E5M2'}"
    assert tensor.stored_bytes == codes.numel() + 4 * scale.numel()


def test_without_scales_codes_are_the_weights(tmp_path):
    codes = gauss(64, 96).to(E4M3)
    path = write(tmp_path / "m", {W: codes})
    assert torch.equal(decoded(path)[0], codes.bfloat16())
    single = tmp_path / "m/model.safetensors"
    assert plugins.sniff(single).name == "float8"


def test_a_large_tensor_is_decoded_in_tiles_of_the_same_numbers(tmp_path):
    codes, scale = gauss(2000, 1500).to(E4M3), gauss(16, 12, seed=2).abs()
    path = write(tmp_path / "m", {W: codes, W + "_scale_inv": scale})
    full = scale.repeat_interleave(128, 0)[:2000].repeat_interleave(128, 1)[:, :1500]
    assert torch.equal(decoded(path)[0], (codes.float() * full).bfloat16())


def test_numbers_are_rounded_once_to_what_is_asked_for(tmp_path):
    codes, scale = gauss(64, 64).to(E4M3), torch.tensor(1 / 3)
    path = write(tmp_path / "m", {W: codes, W + "_scale": scale})
    convert(path, tmp_path / "f32", to_format="safetensors", dtype="f32")
    found = load_file(tmp_path / "f32/model.safetensors")[W]
    assert torch.equal(found, codes.float() * scale)


def test_scales_of_activations_stay_behind_and_are_named(tmp_path):
    attention = "model.layers.0.self_attn"
    path = write(
        tmp_path / "m",
        {
            W: gauss(8, 8).to(E4M3), W + "_scale": torch.ones(()),
            "model.layers.0.mlp.up_proj.input_scale": torch.ones(()),
            f"{attention}.k_scale": torch.ones(()), f"{attention}.v_scale": torch.ones(()),
        },
    )  # fmt: skip
    with open_model(path) as model:
        assert list(model.tensors) == [W]
        assert any("3 scales of activations" in said for said in model.left_behind)


@pytest.mark.parametrize(
    ("scale", "config"),
    [
        (torch.ones(3, 3), {}),
        (torch.ones(5), {}),
        (torch.ones(1, 1, 1), {}),
        (torch.ones(2, 3), {"weight_block_size": [64, 128]}),
        (torch.ones(2, 2, dtype=torch.int32), {}),
    ],
)
def test_scales_that_do_not_fit_are_refused(tmp_path, scale, config):
    tensors = {W: gauss(200, 300).to(E4M3), W + "_scale_inv": scale}
    path = write(tmp_path / "m", tensors, quantization_config={**BLOCKS, **config})
    with pytest.raises(InputError, match=r"up_proj\.weight_scale_inv is .* scales no weight"):
        convert(path, tmp_path / "out")


@pytest.mark.parametrize("size", [[0, 128], [128], "128", [128, 1.5], [128, 1 << 40], {}])
def test_a_block_size_that_is_none(tmp_path, size):
    tensors = {W: gauss(8, 8).to(E4M3), W + "_scale_inv": torch.ones(1, 1)}
    settings = {**BLOCKS, "weight_block_size": size}
    path = write(tmp_path / "m", tensors, quantization_config=settings)
    if size:
        with pytest.raises(InputError, match="weight_block_size"):
            convert(path, tmp_path / "out")


def test_other_methods_beside_it_are_refused(tmp_path):
    integers = {W.replace("0", "1"): torch.zeros(8, 8, dtype=torch.int8)}
    tensors = {W: gauss(8, 8).to(E4M3), **integers}
    with pytest.raises(UnsupportedError, match="an unknown method beside float8"):
        convert(write(tmp_path / "m", tensors), tmp_path / "out")
    path = write(tmp_path / "n", {W: gauss(8, 8).to(E4M3)})
    with pytest.raises(UsageError, match="--config"):
        convert(path, tmp_path / "out", config=path / "config.json")


def test_every_exponent_is_the_number_that_torch_takes_it_for(tmp_path):
    every = torch.arange(256, dtype=torch.uint8)
    for name, scale in {"e8m0": every.view(E8M0), "bytes": every}.items():
        codes = torch.ones(256, 4).to(E4M3)
        path = write(tmp_path / name, {W: codes, W + "_scale": scale})
        with open_model(path, dtype="F32") as model:
            found = numbers(model.tensors[W]).clone()
        wanted = every.view(E8M0).float()
        assert bool(wanted[255].isnan()) and float(wanted[0]) == 2.0**-127
        assert torch.equal(found[:255, 0], wanted[:255])
        assert bool(found[255].isnan().all())


@pytest.mark.parametrize("name", ["weight_scales", "weight_scale_2", "block_scale", "scales"])
def test_a_scale_by_another_name_is_never_left_out(tmp_path, name):
    """The codes alone are no weights."""
    tensors = {W: gauss(8, 8).to(E4M3), W.removesuffix("weight") + name: torch.ones(())}
    with pytest.raises(UnsupportedError, match=f"{name} scales float8 weights in a way") as error:
        convert(write(tmp_path / "m", tensors), tmp_path / "out", to_format="safetensors")
    assert "bfloat16" in error.value.hint


def test_a_weight_has_one_scale(tmp_path):
    tensors = {W: gauss(8, 8).to(E4M3), W + "_scale": torch.ones(()),
               W + "_scale_inv": torch.ones(())}  # fmt: skip
    with pytest.raises(InputError, match="has two scales"):
        convert(write(tmp_path / "m", tensors), tmp_path / "out", to_format="safetensors")


def header_only(path, dtype, nbytes):
    """A file of one tensor of 32 numbers, in a type that torch may not have."""
    entry = {"dtype": dtype, "shape": [1, 32], "data_offsets": [0, nbytes]}
    text = json.dumps({W: entry}).encode()
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "llama"}')
    raw = len(text).to_bytes(8, "little") + text + bytes(nbytes)
    (path / "model.safetensors").write_bytes(raw)
    return path


@pytest.mark.parametrize(
    ("dtype", "nbytes"),
    [("F4", 16), ("F6_E2M3", 24), ("F6_E3M2", 24), ("F8_E4M3FNUZ", 32), ("F8_E5M2FNUZ", 32)],
)
def test_other_types_of_safetensors_are_refused_by_name(tmp_path, dtype, nbytes):
    path = header_only(tmp_path / "m", dtype, nbytes)
    with safe_open(path / "model.safetensors", "pt") as file:
        assert file.get_slice(W).get_dtype() == dtype  # the library knows it
    for source in (path, path / "model.safetensors"):
        with pytest.raises(UnsupportedError, match=f"of type {dtype}") as error:
            convert(source, tmp_path / "out")
        assert "the original, unquantized model" in error.value.hint


def test_scales_without_codes_are_of_another_method(tmp_path):
    tensors = {W: gauss(8, 8), W + "_scale": torch.ones(8, 8).to(E8M0)}
    with pytest.raises(UnsupportedError, match="an unknown method"):
        convert(write(tmp_path / "m", tensors), tmp_path / "out")


def four_bits():
    """Experts of DeepSeek-V4 beside a float8 weight: two codes in a byte, with scales for 32."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-128, 128, (8, 32), dtype=torch.int8, generator=generator)
    scales = torch.randint(110, 130, (8, 2), dtype=torch.uint8, generator=generator).view(E8M0)
    beside = {
        W: gauss(8, 64).to(E4M3),
        W.removesuffix("weight") + "scale": torch.ones(1, 1).to(E8M0),
    }
    return beside | {EXPERT: codes, EXPERT.removesuffix("weight") + "scale": scales}


def test_experts_of_four_bits(tmp_path):
    tensors = four_bits()
    path = write(tmp_path / "m", tensors, quantization_config=BLOCKS)
    assert plugins.sniff(path).name == "float8"
    theirs = Fp8Dequantize(None)
    for name in (W, EXPERT):
        scale = tensors[name.removesuffix("weight") + "scale"]
        found, tensor = decoded(path, name)
        assert torch.equal(found, theirs._dequantize_one(tensors[name], scale, torch.bfloat16))
    assert tensor.stored_as == "MXFP4"


@pytest.mark.parametrize("scale", [torch.ones(8, 1).to(E8M0), torch.ones(8, 2), torch.ones(())])
def test_experts_of_four_bits_that_do_not_fit(tmp_path, scale):
    path = write(tmp_path / "m", four_bits() | {EXPERT.removesuffix("weight") + "scale": scale})
    with pytest.raises(InputError, match=r"columns / 32\) \(MXFP4\)"):
        convert(path, tmp_path / "out")


def test_a_bundle_holds_none_of_it(tmp_path):
    """The specification has its own list of types (H06), for shards and for adapters."""
    raw = (header_only(tmp_path / "m", "F8_E8M0", 32) / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = raw[8:start]
    assert parse_header(header, len(raw), "x", foreign=True).entries[W].nbytes == 32
    for profile in (False, True):
        with pytest.raises(FormatError, match="unknown dtype F8_E8M0") as error:
            parse_header(header, len(raw), "x", profile=profile)
        assert error.value.rule == "H06"
