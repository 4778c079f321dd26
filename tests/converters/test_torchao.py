"""torchao: decoded by the arithmetic that its tensors document."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from loraformat import plugins
from loraformat.errors import UnsupportedError
from loraformat.ops.convert.convert import convert
from tests.converters.quantized_models import (
    Q,
    change,
    check_conversions,
    check_refused,
    make_models,
    quantize,
    replaced,
    without,
)

SETTINGS = {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig"}}}


def spread(numbers, weight):
    """Repeat the numbers of rows, groups or the tensor for each element."""
    for dimension, count in enumerate(weight.shape):
        numbers = numbers.repeat_interleave(count // numbers.shape[dimension], dimension)
    return numbers.double()


def int8(groups=1, *, zeros=True, dtype=torch.bfloat16, rows=None):
    def parts(weight):
        shape = (*weight.shape[:-1], groups) if rows is None else (rows, groups)
        made = {
            "_weight_qdata": torch.randint(-128, 128, weight.shape).to(torch.int8),
            "_weight_scale": (torch.rand(shape) * 0.01).to(dtype),
        }
        if zeros:
            made["_weight_zero_point"] = torch.randint(-8, 8, shape).to(torch.int8)
        return made

    return parts


def int4(size=32, dtype=torch.bfloat16):
    def parts(weight):
        shape = (weight.shape[1] // size, weight.shape[0])
        return {
            "_weight_qdata": torch.randint(
                -128, 128, (weight.shape[0], weight.shape[1] // 2)
            ).char(),
            "_weight_scale": (torch.rand(shape) * 0.01).to(dtype),
            "_weight_zero_point": (torch.randn(shape) * 0.01).to(dtype),
        }

    return parts


def float8(weight):
    return {
        "_weight_qdata": weight.to(torch.float8_e4m3fn),
        "_weight_scale": torch.rand(weight.shape[0], 1),
    }


def decoded(parts):
    codes, scale = parts["_weight_qdata"], parts["_weight_scale"]
    zero = parts.get("_weight_zero_point")
    if zero is not None and zero.is_floating_point():
        low, high = codes << 4 >> 4, codes >> 4  # signed, the first in the low nibble
        codes = torch.stack([low, high], dim=-1).flatten(1)
        exact = codes * spread(scale.T, codes) + spread(zero.T, codes)
    elif zero is not None:
        exact = (codes.double() - spread(zero, codes)) * spread(scale, codes)
    else:
        exact = codes.double() * spread(scale, codes)
    return exact.float().to(torch.float16 if scale.dtype == torch.float16 else torch.bfloat16)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return make_models(tmp_path_factory.mktemp("models"))


CASES = {
    "by row": ("llama", "torchao int8", int8(), 7),
    "by row, symmetric, wide scales": (
        "llama", "torchao int8", int8(zeros=False, dtype=torch.float32), 7),
    "by group": ("llama", "torchao int8", int8(2, dtype=torch.float16), 7),
    "by tensor": ("llama", "torchao int8", int8(zeros=False, rows=1), 7),
    "int4": ("llama", "torchao int4", int4(), 7),
    "experts": ("moe", "torchao int4", int4(16, torch.float16), 16),
    "float8": ("llama", "float8 E4M3", float8, 7),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_is_documented(models, tmp_path, case):
    source, named, parts, count = CASES[case]
    modules = quantize(models / source, tmp_path / "m", parts, SETTINGS)
    assert plugins.sniff(tmp_path / "m").name == "torchao"
    wanted = {f"{owner}.weight": decoded(made) for owner, made in modules.items()}
    check_conversions(tmp_path / "m", wanted, tmp_path, count=count, named=named)


def test_stacks_of_experts(tmp_path):
    """Parameters that are not named weight, of three dimensions, as ``FqnToConfig`` makes them."""
    (tmp_path / "m").mkdir()
    name, codes = "model.layers.0.mlp.experts._gate_up_proj", torch.zeros(3, 8, 32)
    made = int8(2)(codes)
    stored = {name + key.removeprefix("_weight"): part for key, part in made.items()}
    save_file(stored, tmp_path / "m/model.safetensors", {"format": "pt"})
    (tmp_path / "m/config.json").write_text(json.dumps({"model_type": "qwen3_moe"}))
    assert convert(tmp_path / "m", tmp_path / "out", to_format="safetensors").source_format == (
        "torchao"
    )
    found = load_file(tmp_path / "out/model.safetensors")
    assert torch.equal(found["model.layers.0.mlp.experts.gate_up_proj"], decoded(made))


def test_scales_of_activations_are_left_behind(models, tmp_path):
    quantize(models / "llama", tmp_path / "m", int8(), SETTINGS)
    change(tmp_path / "m", lambda t: t.update({f"{Q}._weight_act_quant_scale": torch.ones(1, 1)}))
    with plugins.sniff(tmp_path / "m").read(tmp_path / "m", plugins.ReadOptions()) as model:
        assert any("1 scales of activations" in said for said in model.left_behind)


@pytest.mark.parametrize("allowed", [True, False])
def test_pickles_are_refused(models, tmp_path, allowed):
    """Of tensor subclasses; also where the unpickler is allowed."""
    quantize(models / "llama", tmp_path / "m", int8(), SETTINGS)
    tensors = load_file(tmp_path / "m/model.safetensors")
    torch.save(tensors, tmp_path / "m/pytorch_model.bin")
    (tmp_path / "m/model.safetensors").unlink()
    with pytest.raises(UnsupportedError, match="torchao" if allowed else "pickle"):
        convert(tmp_path / "m", tmp_path / "out", allow_pickle=allowed)
    assert not (tmp_path / "out").exists()


def three_groups(tensors):
    for name in ("_weight_scale", "_weight_zero_point"):
        tensors[f"{Q}.{name}"] = torch.ones(3, 64)


BAD = {
    "no scales": (int8(), without("_weight_scale"), "scale is missing"),
    "fewer scales": (int8(), replaced("_weight_scale", lambda t: t[:-1]), "zero_point is I8"),
    "fewer scales and no zeros": (
        int8(zeros=False), replaced("_weight_scale", lambda t: t[:-1]), "wanted I8"),
    "groups that do not divide": (
        int8(zeros=False), replaced("_weight_scale", lambda t: t.repeat(1, 3)), "that divide in"),
    "no zeros of int4": (int4(), without("_weight_zero_point"), "wanted I8"),
    "groups of int4 that do not divide": (int4(), three_groups, "groups that divide in"),
    "int4 codes of fewer rows": (
        int4(), replaced("_weight_qdata", lambda t: t[:-1]), "wanted I8"),
    "a vector": (int8(zeros=False), replaced("_weight_qdata", lambda t: t.flatten()), "wanted I8"),
    "scales of another type": (
        int8(), replaced("_weight_scale", lambda t: t.long()), "is I64"),
    "tiles of a kernel": (
        int8(), replaced("_weight_qdata", lambda t: t.int().reshape(8, 8, 8, 8)), "Int4Tensor and"),
    "a factor of activations": (
        int8(), lambda t: t.update({f"{Q}._weight_act_pre_scale": torch.ones(64)}),
        "act_pre_scale belongs to"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", BAD)
def test_wrong_input_is_refused(models, tmp_path, wrong):
    parts, edit, said = BAD[wrong]
    quantize(models / "llama", tmp_path / "m", parts, SETTINGS)
    check_refused(change(tmp_path / "m", edit), tmp_path / "out", said, from_format="torchao")
