"""bitsandbytes int8 and FP4: what transformers saves, decoded as bitsandbytes decodes it."""

import json

import numpy
import pytest
import torch
import transformers
from bitsandbytes import functional
from safetensors.torch import load_file, save_file
from transformers.integrations.bitsandbytes import dequantize_bnb_weight

from loraformat import plugins
from loraformat.errors import FormatError
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

INT8 = {"quant_method": "bitsandbytes", "load_in_8bit": True}
FP4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}


def int8(weight):
    codes, scale, _ = functional.int8_vectorwise_quant(weight.half())
    return {"weight": codes, "SCB": scale, "weight_format": torch.tensor(0, dtype=torch.uint8)}


def fp4(nested=True, size=64):
    def parts(weight):
        packed, state = functional.quantize_4bit(
            weight, quant_type="fp4", compress_statistics=nested, blocksize=size
        )
        named = state.as_dict(packed=True)
        return {"weight": packed} | {f"weight.{name}": part for name, part in named.items()}

    return parts


def decoded(modules):
    """Return what bitsandbytes makes of the parts."""
    found = {}
    for owner, parts in modules.items():
        if "SCB" in parts:
            values = functional.int8_vectorwise_dequant(parts["weight"], parts["SCB"]).bfloat16()
        else:
            state = {name.removeprefix("weight."): part for name, part in parts.items()}
            packed = state.pop("weight")
            state = functional.QuantState.from_dict(dict(state), torch.device("cpu"))
            values = functional.dequantize_4bit(packed, state)
        found[f"{owner}.weight"] = values
    return found


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return make_models(tmp_path_factory.mktemp("models"))


CASES = {
    "int8": (int8, INT8, "bitsandbytes-int8"),
    "fp4": (fp4(), FP4, "bitsandbytes-fp4"),
    "fp4 without double quantization": (fp4(nested=False), FP4, "bitsandbytes-fp4"),
}


@pytest.mark.parametrize(("source", "count"), [("llama", 7), ("moe", 16)])
@pytest.mark.parametrize("case", CASES)
def test_what_the_library_decodes(models, tmp_path, case, source, count):
    parts, settings, name = CASES[case]
    modules = quantize(models / source, tmp_path / "m", parts, settings)
    assert plugins.sniff(tmp_path / "m").name == name
    named = name.replace("-", " ")
    check_conversions(tmp_path / "m", decoded(modules), tmp_path, count=count, named=named)


@pytest.mark.parametrize("options", [INT8, FP4])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_what_transformers_saves(models, tmp_path, kind, options):
    """Also GPT-2, whose modules store the transpose of what is quantized."""
    source = models / kind
    if kind == "gpt2" and not source.exists():
        config = transformers.GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=64)
        transformers.GPT2LMHeadModel(config).bfloat16().save_pretrained(source)
    settings = transformers.BitsAndBytesConfig(
        **{name: value for name, value in options.items() if name != "quant_method"}
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        source, quantization_config=settings, dtype=torch.bfloat16
    )
    model.save_pretrained(tmp_path / "m")
    convert(tmp_path / "m", tmp_path / "out", to_format="safetensors")
    found = load_file(tmp_path / "out/model.safetensors")
    dense = load_file(source / "model.safetensors")
    assert found.keys() == dense.keys()
    quantized = 0
    for name, weight in dense.items():
        module = model.get_submodule(name.rpartition(".")[0])
        wanted = weight
        kind_of = type(module.weight).__name__
        if name.endswith(".weight") and kind_of in ("Params4bit", "Int8Params"):
            quantized += 1
            wanted = dequantize_bnb_weight(module.weight, getattr(module, "state", None))
            wanted = wanted.bfloat16() if "c_" not in name else wanted.bfloat16().T
        assert torch.equal(found[name], wanted), name
    assert quantized == (7 if kind == "llama" else 4)


@pytest.mark.parametrize("size", [64, 4096])
def test_rows_where_blocks_run_on(tmp_path, size):
    """Rows of 72 numbers: a block begins inside a row, and the last one is not full."""
    weight = torch.randn(33, 72)
    parts = fp4(size=size)(weight)
    (tmp_path / "m").mkdir()
    (tmp_path / "m/config.json").write_text(json.dumps({"model_type": "llama"}))
    save_file({f"{Q}.{name}": part for name, part in parts.items()},
              tmp_path / "m/model.safetensors")  # fmt: skip
    with plugins.sniff(tmp_path / "m").read(tmp_path / "m", plugins.ReadOptions()) as model:
        tensor = model.tensors[f"{Q}.weight"]
        assert tensor.dtype == "F32"
        wanted = decoded({Q: parts})[f"{Q}.weight"].numpy()
        for start, stop in [(0, 33), (32, 33), (5, 9), (7, 7)]:
            assert numpy.array_equal(tensor.rows(start, stop), wanted[start:stop])


STATE = "weight.quant_state.bitsandbytes__fp4"


def text(edit):
    return replaced(STATE, lambda t: torch.tensor(list(edit(bytes(t.tolist()))), dtype=torch.uint8))


BAD = {
    "no scales": ("int8", without("SCB"), "SCB is missing"),
    "no codes": ("int8", without("weight"), "weight is missing"),
    "fewer scales": ("int8", replaced("SCB", lambda t: t[:-1]), "wanted F32"),
    "scales of another type": ("int8", replaced("SCB", lambda t: t.half()), "is F16"),
    "codes of another type": ("int8", replaced("weight", lambda t: t.view(torch.uint8)), "is U8"),
    "a vector": (
        "int8", lambda t: t.update({f"{Q}.weight": torch.zeros(64).char()}), "wanted .out, in."),
    "a kernel's layout": ("int8", replaced("weight_format", lambda t: t + 2), "a GPU's kernel"),
    "no absmax": ("fp4", without("weight.absmax"), "absmax is missing"),
    "no nested scales": ("fp4", without("weight.nested_absmax"), "nested_absmax is missing"),
    "fewer absmax": ("fp4", replaced("weight.absmax", lambda t: t[:-1]), "wanted U8"),
    "fewer codes": ("fp4", replaced("weight", lambda t: t[:-1]), "bytes of codes"),
    "another table": ("fp4", replaced("weight.quant_map", lambda t: t * 2), "not the table"),
    "a table of more": (
        "fp4", replaced("weight.quant_map", lambda t: t.repeat(2)), r"wanted F32 \[16\]"),
    "a shape of one dimension": (
        "fp4", text(lambda t: t.replace(b"[64, 64]", b"[4096]")), "no matrix of shape"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", BAD)
def test_wrong_input_is_refused(models, tmp_path, wrong):
    case, edit, said = BAD[wrong]
    parts, settings, name = CASES[case]
    quantize(models / "llama", tmp_path / "m", parts, settings)
    check_refused(change(tmp_path / "m", edit), tmp_path / "out", said, from_format=name)


#: What a reader of NF4 refuses in the same words, by the rules of the specification.
BAD_STATES = {
    "no quant state": (without(STATE), "quant state is missing"),
    "another type's state": (text(lambda t: t.replace(b"fp4", b"nf4")), "wanted fp4"),
    "a block size that is none": (
        text(lambda t: t.replace(b"size\": 64", b"size\": 60")), "blocksize is 60"),
    "what is no JSON": (text(lambda t: t[1:]), "not strict JSON"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", BAD_STATES)
def test_a_wrong_quant_state_is_refused(models, tmp_path, wrong):
    edit, said = BAD_STATES[wrong]
    quantize(models / "llama", tmp_path / "m", fp4(), FP4)
    with pytest.raises(FormatError, match=said):
        convert(change(tmp_path / "m", edit), tmp_path / "out", from_format="bitsandbytes-fp4")
    assert not (tmp_path / "out").exists()
