"""Experts in NF4 in the layouts of other programs: every code is kept, both ways."""

import json

import bitsandbytes.functional as bnb
import pytest
import torch
import transformers
from bitsandbytes.nn.parametrize import replace_parameter_4bit
from safetensors.torch import load_file, save_file

import loraformat
from loraformat.errors import FormatError, InputError, UnsupportedError, UsageError
from loraformat.model.checkpoint import NF4Tensor
from loraformat.ops.convert.convert import convert
from loraformat.train import LoraOptions, load
from tests.adapters import moe_models

GATE_UP = "model.layers.0.mlp.experts.gate_up_proj"
SETTINGS = {
    "quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False,
    "bnb_4bit_quant_type": "nf4",
}  # fmt: skip
#: What a run of elements keeps where a matrix of the fused parameter is two: see `runs.kept`.
SIZES = {"all": (128, 128), "codes": (64, 64)}


def save(folder, model_type="qwen3_moe", sizes=(64, 64), **changes):
    hidden, intermediate = sizes
    model = moe_models.make(
        model_type, hidden_size=hidden, intermediate_size=intermediate,
        moe_intermediate_size=intermediate, **changes,
    )  # fmt: skip
    model.save_pretrained(folder)
    return model


def quantized(name, weight, **options):
    """The tensors of a weight as bitsandbytes writes them, and the numbers it decodes."""
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", **options)
    parts = {f"{name}.{part}": t for part, t in state.as_dict(packed=True).items()}
    return {name: packed, **parts}, bnb.dequantize_4bit(packed, state)


def checkpoint(folder, tensors):
    """A directory of some tensors, with the config of a model that was quantized."""
    (folder / "published").mkdir()
    save_file(
        {k: t.contiguous() for k, t in tensors.items()}, folder / "published/model.safetensors"
    )
    config = json.loads((folder / "model/config.json").read_text())
    text = json.dumps(config | {"quantization_config": SETTINGS})
    (folder / "published/config.json").write_text(text)
    return folder / "published"


def one_by_one(folder, **options):
    """What unsloth publishes: six tensors for each expert's projection (unsloth-zoo#856)."""
    tensors, decoded = {}, {}
    for name, weight in load_file(folder / "model/model.safetensors").items():
        if ".experts." not in name:
            tensors[name] = decoded[name] = weight
            continue
        parts, decoded[name] = quantized(name, weight, **options)
        tensors |= parts
    return checkpoint(folder, tensors), decoded


def attribute(model, name):
    module, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(module), leaf)


def stored(folder):
    return load_file(folder / "model.safetensors")


def dense(bundle):
    convert(bundle, bundle.with_name("dense"), to="safetensors")
    return stored(bundle.with_name("dense"))


def stacks(bundle):
    with loraformat.open_bundle(bundle) as opened:
        tensors = opened.tensors.values()
        return {t.name: t for t in tensors if isinstance(t, NF4Tensor) and t.segments is not None}


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize(
    ("model_type", "parts"),
    [
        ("qwen3_moe", ("gate_proj", "up_proj", "down_proj")),
        ("mixtral", ("w1", "w3", "w2")),
        ("deepseek_v3", ("gate_proj", "up_proj", "down_proj")),
    ],
)
def test_a_weight_for_each_expert_keeps_every_code(model_type, parts, double_quant, tmp_path):
    save(tmp_path / "model", model_type)
    source, decoded = one_by_one(tmp_path, compress_statistics=double_quant)
    convert(source, tmp_path / "bundle")
    found = stacks(tmp_path / "bundle")
    assert {name.rpartition(".")[2] for name in found} == {"gate_up_proj", "down_proj"}
    for name, stack in found.items():
        assert stack.segments == moe_models.EXPERTS * (2 if "gate_up" in name else 1)
        assert stack.double_quant == double_quant
    numbers = dense(tmp_path / "bundle")
    for name in found:
        before = name.rpartition(".")[0].replace(".mlp.", ".block_sparse_moe.")
        before = before if model_type == "mixtral" else name.rpartition(".")[0]
        wanted = parts[:2] if "gate_up" in name else parts[2:]
        for expert, matrix in enumerate(numbers[name]):
            each = [decoded[f"{before}.{expert}.{part}.weight"] for part in wanted]
            assert torch.equal(matrix, torch.cat(each)), name
    report = convert(tmp_path / "bundle", tmp_path / "back", to="bitsandbytes", experts="each")
    assert not any("codes" in note for note in report.notes)
    before, after = stored(source), stored(tmp_path / "back")
    if model_type == "mixtral":  # transformers reads both spellings, and writes the other one
        before = {name.replace("block_sparse_moe", "mlp"): t for name, t in before.items()}
    experts = {name for name in before if ".experts." in name}
    assert experts == {name for name in after if ".experts." in name}
    assert all(torch.equal(before[name], after[name]) for name in experts)


@pytest.mark.parametrize("kept", SIZES)
@pytest.mark.parametrize("layout", ["each", "fused", "experts4bit"])
def test_a_bundle_decodes_to_the_same_bits_in_every_layout(layout, kept, tmp_path):
    save(tmp_path / "model", sizes=SIZES[kept])
    convert(tmp_path / "model", tmp_path / "bundle")
    report = convert(tmp_path / "bundle", tmp_path / "other", to="bitsandbytes", experts=layout)
    says = any("keep their codes" in note for note in report.notes)
    assert says == (layout == "fused" or (layout == "each" and kept == "codes"))
    convert(tmp_path / "other", tmp_path / "again")
    ours = dense(tmp_path / "bundle")
    convert(tmp_path / "again", tmp_path / "dense2", to="safetensors")
    theirs = stored(tmp_path / "dense2")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    if (layout, kept) == ("each", "all"):
        assert all(stack.double_quant for stack in stacks(tmp_path / "again").values())


def test_matrices_that_end_inside_a_block_are_quantized_again_and_it_is_said(tmp_path):
    model = save(tmp_path / "model", sizes=(64, 33))
    convert(tmp_path / "model", tmp_path / "bundle", block_size=128)
    report = convert(tmp_path / "bundle", tmp_path / "other", to="bitsandbytes", experts="each")
    (said,) = [note for note in report.notes if "quantized again" in note]
    assert said.startswith("2 stacks of experts (model.layers.0.mlp.experts.gate_up_proj, ...)")
    after = stored(tmp_path / "other")
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    state = bnb.QuantState.from_dict(
        {key: t for key, t in after.items() if key.startswith(name + ".")}, device="cpu"
    )
    original = model.model.layers[1].mlp.experts.gate_up_proj[2][33:]
    found = bnb.dequantize_4bit(after[name], state)
    assert (found - original).norm() < 0.2 * original.norm()


@pytest.mark.parametrize("layout", ["each", "experts4bit"])
@pytest.mark.parametrize("model_type", ["gpt_oss", "nemotron_h"])
def test_what_a_layout_cannot_hold_stays_dense(model_type, layout, tmp_path):
    """Experts of (experts, in, out), and experts without a gate."""
    save(tmp_path / "model", model_type)
    report = convert(tmp_path / "model", tmp_path / "out", to="bitsandbytes", experts=layout)
    before, after = stored(tmp_path / "model"), stored(tmp_path / "out")
    if (model_type, layout) == ("nemotron_h", "each"):
        assert any(".experts.3.up_proj.weight.absmax" in name for name in after)
        return
    assert any("are not quantized" in note for note in report.notes)
    experts = [name for name in after if ".experts." in name]
    assert experts
    total = sum(before[name].double().sum() for name in before if ".experts." in name)
    assert sum(after[name].double().sum() for name in experts) == pytest.approx(float(total))
    convert(tmp_path / "model", tmp_path / "bundle")
    convert(tmp_path / "bundle", tmp_path / "back", to="bitsandbytes", experts=layout)
    numbers = dense(tmp_path / "bundle")
    again = stored(tmp_path / "back")
    experts = [name for name in numbers if ".experts." in name]
    assert all(torch.equal(again[name], numbers[name]) for name in experts)


@pytest.mark.parametrize("double_quant", [True, False])
def test_a_parameter_that_bitsandbytes_replaced(double_quant, tmp_path):
    """`replace_parameter_4bit`: one run of blocks over all experts, under the parameter's name."""
    model = save(tmp_path / "model", sizes=(128, 128))
    for layer in model.model.layers:
        for name in ("gate_up_proj", "down_proj"):
            options = dict(compress_statistics=double_quant, quant_type="nf4")
            replace_parameter_4bit(layer.mlp.experts, name, **options)
    source = checkpoint(tmp_path, dict(model.state_dict()))
    convert(source, tmp_path / "bundle")
    found = stacks(tmp_path / "bundle")
    assert {stack.double_quant for stack in found.values()} == {double_quant}
    assert len(found) == 4
    numbers = dense(tmp_path / "bundle")
    for name in found:
        assert torch.equal(numbers[name], attribute(model, name)), name

    options = {} if double_quant else {"double_quant": False}
    convert(tmp_path / "model", tmp_path / "ours", to="bitsandbytes", experts="fused", **options)
    theirs, ours = stored(source), stored(tmp_path / "ours")
    parts = [name for name in theirs if ".experts." in name]
    if double_quant:  # bitsandbytes sums the mean of all scales, their offset, in float32
        parts = [name for name in parts if name in found]
    assert parts
    assert all(torch.equal(ours[name], theirs[name]) for name in parts)


def experts4bit(folder):
    """A model as `Experts4bit` stores it (bitsandbytes#1965): an expert is a row."""
    model = save(folder / "model")
    tensors, decoded = dict(model.state_dict()), {}
    for name in [name for name in tensors if ".experts." in name]:
        rows = [bnb.quantize_4bit(one, quant_type="nf4", compress_statistics=False)
                for one in tensors[name]]  # fmt: skip
        tensors[name] = torch.stack([packed.reshape(-1) for packed, _ in rows])
        scales = torch.stack([state.absmax for _, state in rows])
        tensors[name.removesuffix("_proj") + "_absmax"] = scales
        decoded[name] = torch.stack([bnb.dequantize_4bit(*row) for row in rows])
    return tensors, decoded


def test_experts4bit(tmp_path):
    tensors, decoded = experts4bit(tmp_path)
    source = checkpoint(tmp_path, tensors)
    convert(source, tmp_path / "bundle")
    numbers = dense(tmp_path / "bundle")
    assert all(torch.equal(numbers[name], values) for name, values in decoded.items())
    for start in ("bundle", "model"):
        convert(
            tmp_path / start, tmp_path / f"of-{start}", to="bitsandbytes", experts="experts4bit"
        )
        found = stored(tmp_path / f"of-{start}")
        names = [name for name in tensors if ".experts." in name]
        assert {name for name in found if ".experts." in name} == set(names)
        assert all(torch.equal(found[name], tensors[name]) for name in names)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (lambda t: t.pop(GATE_UP.replace("gate_up_proj", "down_absmax")), InputError, "no scales"),
        (lambda t: t.update({"model.layers.0.mlp.experts.gate_up_absmax": torch.ones(4, 7)}),
         InputError, "has scales"),
        (lambda t: t["model.layers.0.mlp.experts.gate_up_absmax"].fill_(float("inf")), InputError,
         "not finite"),
        (lambda t: t.update({GATE_UP: torch.zeros(4, 4097, dtype=torch.uint8)}), InputError,
         "not whole rows"),
    ],
)  # fmt: skip
def test_damaged_experts4bit(change, error, says, tmp_path):
    tensors, _ = experts4bit(tmp_path)
    change(tensors)
    with pytest.raises(error, match=says):
        convert(checkpoint(tmp_path, tensors), tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_experts4bit_in_fp4_are_refused(tmp_path):
    tensors, _ = experts4bit(tmp_path)
    source = checkpoint(tmp_path, tensors)
    text = (source / "config.json").read_text().replace('"nf4"', '"fp4"')
    (source / "config.json").write_text(text)
    with pytest.raises(UnsupportedError, match="experts in fp4, not NF4"):
        convert(source, tmp_path / "bundle")


def test_an_expert_without_a_part_is_refused(tmp_path):
    save(tmp_path / "model")
    source, _ = one_by_one(tmp_path)
    tensors = stored(source)
    del tensors["model.layers.0.mlp.experts.2.up_proj.weight.quant_map"]
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(FormatError, match="quant_map is missing"):
        convert(source, tmp_path / "bundle")


def test_layouts_are_for_bitsandbytes(tmp_path):
    save(tmp_path / "model")
    for to in ("loraformat", "safetensors"):
        with pytest.raises(UsageError, match="--experts each is for bitsandbytes") as refused:
            convert(tmp_path / "model", tmp_path / "out", to=to, experts="each")
        assert "--to bitsandbytes" in refused.value.hint
    with pytest.raises(UsageError, match="wanted one of dense, each, fused, experts4bit"):
        convert(tmp_path / "model", tmp_path / "out", to="bitsandbytes", experts="stacked")


def test_a_gate_and_an_up_quantized_apart_train_and_open(tmp_path):
    """Stacks of two segments for each expert: in the trainer, and opened in transformers."""
    import loraformat.transformers as registered

    save(tmp_path / "model")
    source, _ = one_by_one(tmp_path)
    bundle = tmp_path / "bundle"
    convert(source, bundle)
    dense(bundle)
    eager = dict(attn_implementation="eager", experts_implementation="eager", dtype=torch.float32)
    find = transformers.AutoModelForCausalLM.from_pretrained
    wanted = moe_models.logits(find(tmp_path / "dense", **eager))
    opened = find(bundle, **eager)
    stack = opened.model.layers[0].mlp.experts.gate_up_proj
    assert isinstance(stack, registered.NF4Experts)
    assert stack.state.segments == 2 * moe_models.EXPERTS
    assert torch.equal(stack.formula(3), stack[1].reshape(-1)[stack.state.count :])
    torch.testing.assert_close(moe_models.logits(opened), wanted, rtol=0, atol=1e-6)
    with load(bundle, lora=LoraOptions(rank=4, alpha=8)).eval() as model:
        torch.testing.assert_close(moe_models.logits(model), wanted, rtol=0, atol=1e-5)
        model(moe_models.TOKENS).logits.sum().backward()
        gradients = [branch.b.grad for name, branch in model.branches.items() if "experts" in name]
    assert gradients
    assert all(bool(gradient.abs().max() > 0) for gradient in gradients)
