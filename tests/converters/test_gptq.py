"""GPTQ: packed as its programs pack, and decoded to what was packed."""

import json

import numpy
import pytest
import torch

from loraformat import plugins
from loraformat.errors import UnsupportedError
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


def pack(codes, bits):
    """Return words of codes along the first dimension, as AutoGPTQ's loops make them."""
    codes = codes.numpy().astype(numpy.uint32)
    words = numpy.zeros((len(codes) * bits // 32, codes.shape[1]), numpy.uint32)
    if bits != 3:
        for n, row in enumerate(codes):
            words[n * bits // 32] |= row << numpy.uint32(n * bits % 32)
        return torch.from_numpy(words.view(numpy.int32))
    for n in range(0, len(codes), 32):  # 10 codes and a part, then 10 and a part, then 10
        one, two, three = words[n // 32 * 3 : n // 32 * 3 + 3]
        for k in range(10):
            one |= codes[n + k] << 3 * k
            two |= codes[n + 11 + k] << 3 * k + 1
            three |= codes[n + 22 + k] << 3 * k + 2
        one |= codes[n + 10] << 30
        two |= codes[n + 10] >> 2 | codes[n + 21] << 31
        three |= codes[n + 21] >> 1
    return torch.from_numpy(words.view(numpy.int32))


def gptq(bits, group=32, *, version=1, symmetric=False, ordered=False, dtype=torch.float16):
    """Return a function that makes parts of a weight, which also remembers what they are of."""

    def parts(weight):
        out, into = weight.shape
        groups = into // group
        codes = torch.randint(0, 1 << bits, (into, out))
        zeros = torch.randint(0, 1 << bits, (groups, out))
        if symmetric:
            zeros[:] = 1 << bits - 1
        scales = (torch.rand(groups, out) * 0.01 + 0.001).to(dtype)
        g_idx = torch.arange(into) // group
        if ordered:
            g_idx = g_idx[torch.randperm(into)]
        stored = zeros - 1 if version == 1 else zeros
        weights = scales.float()[g_idx] * (codes - zeros[g_idx]).float()
        parts.wanted.append(weights.T.contiguous().to(dtype))
        return {
            "qweight": pack(codes, bits), "qzeros": pack(stored.T & (1 << bits) - 1, bits).T,
            "scales": scales, "g_idx": g_idx.to(torch.int32),
        }  # fmt: skip

    def contiguous(weight):
        return {name: part.contiguous() for name, part in parts(weight).items()}

    parts.wanted = contiguous.wanted = []
    return contiguous


def settings(bits, **more):
    return {"quant_method": "gptq", "bits": bits, "group_size": 32, "sym": False, **more}


FORMS = {
    **{f"{bits} bits": (gptq(bits), settings(bits)) for bits in (2, 3, 4, 8)},
    "3 bits, version 2": (gptq(3, version=2), settings(3, checkpoint_format="gptq_v2")),
    "4 bits, version 2": (gptq(4, version=2), settings(4, checkpoint_format="gptq_v2")),
    "4 bits, planes": (gptq(4, version=2), settings(4, format="gptq_p")),
    "symmetric": (gptq(4, symmetric=True), settings(4, sym=True)),
    "symmetric, of a version that is not named": (
        gptq(4, symmetric=True, version=2), settings(4, sym=True)),
    "ordered by activations": (gptq(4, ordered=True), settings(4, desc_act=True)),
    "3 bits, ordered by activations": (gptq(3, ordered=True), settings(3, desc_act=True)),
    "by channel": (gptq(8, 64), settings(8, group_size=-1)),
    "scales of bfloat16": (gptq(4, dtype=torch.bfloat16), settings(4)),
    "AutoRound's": (
        gptq(4, symmetric=True), settings(4, sym=True, quant_method="auto-round")),
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return make_models(tmp_path_factory.mktemp("models"))


def stored(models, path, form, source="llama", chosen=lambda name: "proj.weight" in name):
    """Write a checkpoint and return the weights that are in it."""
    make, said = FORMS[form]
    make.wanted.clear()
    modules = quantize(models / source, path, make, said, chosen)
    return {f"{owner}.weight": w for owner, w in zip(modules, make.wanted, strict=True)}


@pytest.mark.parametrize("form", FORMS)
def test_every_form(models, tmp_path, form):
    wanted = stored(models, tmp_path / "m", form)
    assert plugins.sniff(tmp_path / "m").name == "gptq"
    named = f"GPTQ int{FORMS[form][1]['bits']}"
    check_conversions(tmp_path / "m", wanted, tmp_path, count=7, named=named)


def test_zeros_of_the_first_version_that_wrap(models, tmp_path):
    """A zero of 0 is stored as the largest code, and AutoGPTQ's symmetric 4 bits as 0x77777777."""
    stored(models, tmp_path / "m", "4 bits")
    change(tmp_path / "m", lambda t: t[f"{Q}.qzeros"].fill_(-1))
    with plugins.sniff(tmp_path / "m").read(tmp_path / "m", plugins.ReadOptions()) as model:
        assert float(numbers(model.tensors[f"{Q}.weight"]).min()) >= 0
    change(tmp_path / "m", lambda t: t[f"{Q}.qzeros"].fill_(0x77777777))
    convert(tmp_path / "m", tmp_path / "zeros", to_format="safetensors")
    change(tmp_path / "m", sym=True)
    convert(tmp_path / "m", tmp_path / "middle", to_format="safetensors")
    name = f"{Q}.weight"
    assert loaded(tmp_path / "zeros")[name] == loaded(tmp_path / "middle")[name]


def test_without_g_idx_groups_stand_in_a_row(models, tmp_path):
    wanted = stored(models, tmp_path / "m", "4 bits")
    change(tmp_path / "m", lambda t: [t.pop(n) for n in list(t) if n.endswith("g_idx")])
    check_conversions(tmp_path / "m", wanted, tmp_path, count=7, named="GPTQ int4")


def test_modules_with_bits_of_their_own(models, tmp_path):
    """GPTQModel's ``dynamic``: the shapes say them."""
    make, said = gptq(8), settings(4, dynamic={r"+:.*down.*": {"bits": 8}})
    wanted = stored(models, tmp_path / "m", "4 bits", chosen=lambda n: "q_proj.weight" in n)
    modules = quantize(
        tmp_path / "m", tmp_path / "two", make, said, lambda n: n.endswith("down_proj.weight")
    )
    wanted |= {f"{owner}.weight": w for owner, w in zip(modules, make.wanted, strict=True)}
    report = convert(tmp_path / "two", tmp_path / "bundle")
    assert [step.types for step in report.quantized_before] == [{"GPTQ int4": 1, "GPTQ int8": 1}]
    with plugins.sniff(tmp_path / "two").read(tmp_path / "two", plugins.ReadOptions()) as model:
        for name, weight in wanted.items():
            assert torch.equal(numbers(model.tensors[name]), weight)


@pytest.mark.parametrize(("source", "count"), [("moe", 16), ("tied", 7)])
def test_experts_and_tied_heads(models, tmp_path, source, count):
    wanted = stored(models, tmp_path / "m", "4 bits", source)
    assert len(wanted) == count
    check_conversions(tmp_path / "m", wanted, tmp_path, count=count, named="GPTQ int4")


def test_some_rows_are_those_of_the_whole(models, tmp_path):
    for form in ("3 bits, ordered by activations", "2 bits"):
        stored(models, tmp_path / form, form)
        with plugins.sniff(tmp_path / form).read(tmp_path / form, plugins.ReadOptions()) as model:
            tensor = model.tensors[f"{Q}.weight"]
            whole = tensor.array()
            for start, stop in [(0, 1), (5, 7), (31, 34), (63, 64), (10, 10)]:
                assert tensor.rows(start, stop).tobytes() == whole[start:stop].tobytes()


def test_settings_of_autogptq_stay_behind(models, tmp_path):
    """Older checkpoints name the version there only."""
    wanted = stored(models, tmp_path / "m", "4 bits, version 2")
    path = tmp_path / "m/config.json"
    config = json.loads(path.read_text())
    said = config.pop("quantization_config")
    path.write_text(json.dumps(config))
    (tmp_path / "m/quantize_config.json").write_text(json.dumps(said))
    convert(tmp_path / "m", tmp_path / "plain", to_format="safetensors")
    found = loaded(tmp_path / "plain")
    assert found[f"{Q}.weight"][-1] == wanted[f"{Q}.weight"].numpy().tobytes()
    assert not (tmp_path / "plain/quantize_config.json").exists()


BAD = {
    "no scales": (without("scales"), {}, "scales is missing"),
    "no zeros": (without("qzeros"), {}, "qzeros is missing"),
    "fewer words": (replaced("qweight", lambda t: t[:-1]), {}, r"g_idx is I32 \[64\], wanted"),
    "fewer outputs": (replaced("qweight", lambda t: t[:, :-1]), {}, "wanted I32"),
    "a vector": (replaced("qweight", lambda t: t.flatten()), {}, "wanted I32"),
    "words of another type": (replaced("qweight", lambda t: t.long()), {}, "wanted I32"),
    "fewer scales": (replaced("scales", lambda t: t[:-1]), {}, "wanted I32"),
    "scales of another type": (replaced("scales", lambda t: t.double()), {}, "wanted F32"),
    "fewer zeros": (replaced("qzeros", lambda t: t[:, :-1]), {}, "wanted I32"),
    "a group too many": (replaced("g_idx", lambda t: t + 1), {}, "g_idx names groups beyond"),
    "a group below": (replaced("g_idx", lambda t: t - 1), {}, "g_idx names groups beyond"),
    "another number of bits": (None, {"bits": 8}, "8 bits"),
    "bits that are none": (None, {"bits": "four"}, "four bits"),
    "groups that do not divide": (
        lambda t: [
            replaced("scales", lambda t: t.repeat(3, 1)[:5])(t),
            replaced("qzeros", lambda t: t.repeat(3, 1)[:5])(t), without("g_idx")(t),
        ], {}, "5 groups, which do not divide the 64"),
    "another format": (None, {"checkpoint_format": "marlin"}, "the format marlin"),
    "a format that is none": (None, {"checkpoint_format": ["gptq"]}, "in the format"),
    "Marlin's": (None, {"is_marlin_format": True}, "only gptq, gptq_v2, gptq_p can be read"),
    "AWQ in another layout": (None, {"quant_method": "awq"}, "with awq in the format gptq"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", BAD)
def test_wrong_input_is_refused(models, tmp_path, wrong):
    edit, more, said = BAD[wrong]
    stored(models, tmp_path / "m", "4 bits")
    change(tmp_path / "m", edit, **more)
    check_refused(tmp_path / "m", tmp_path / "out", said, from_format="gptq")


def test_codes_of_three_bits_in_planes(models, tmp_path):
    stored(models, tmp_path / "m", "3 bits, version 2")
    change(tmp_path / "m", checkpoint_format="gptq_p")
    with pytest.raises(UnsupportedError, match="3 bits in the format gptq_p"):
        convert(tmp_path / "m", tmp_path / "out")


def test_weights_that_stand_the_other_way_round(models, tmp_path):
    """GPT-2's Conv1D: (in, out), and packed as (out, in)."""
    stored(models, tmp_path / "m", "4 bits")

    def edit(tensors):
        for part in ("qweight", "qzeros", "scales", "g_idx"):
            tensors[f"transformer.h.0.attn.c_attn.{part}"] = tensors[f"{Q}.{part}"].clone()

    change(tmp_path / "m", edit)
    path = tmp_path / "m/config.json"
    path.write_text(path.read_text().replace('"llama"', '"gpt2"'))
    check_refused(tmp_path / "m", tmp_path / "out", "is of a Conv1D")
