"""MLX: decoded by the arithmetic that ``mlx.core.quantize`` documents; names as in the original."""

import json

import ml_dtypes
import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file

from loraformat import plugins
from loraformat.ops.convert.convert import convert
from tests.converters.quantized_models import (
    Q,
    change,
    check_refused,
    make_models,
    quantize,
    replaced,
    without,
)

E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
#: Number of each code, type of the scales and group size of modes of floats.
FLOATS = {
    "mxfp4": (numpy.array(E2M1 + [-x for x in E2M1], "f4"), ml_dtypes.float8_e8m0fnu, 32),
    "nvfp4": (numpy.array(E2M1 + [-x for x in E2M1], "f4"), ml_dtypes.float8_e4m3fn, 16),
    "mxfp8": (numpy.arange(256, dtype="u1").view(ml_dtypes.float8_e4m3fn).astype("f4"),
              ml_dtypes.float8_e8m0fnu, 32),
}  # fmt: skip


def packed(codes, bits):
    """Write codes bit after bit, the lowest first, in words of 32."""
    stream = (codes[..., None] >> numpy.arange(bits) & 1).reshape(*codes.shape[:-1], -1)
    data = numpy.packbits(stream.astype(numpy.uint8), axis=-1, bitorder="little")
    return torch.from_numpy(data.view("<u4").copy())


def affine(bits=4, size=64, dtype=torch.float16):
    def parts(weight):
        shape = (*weight.shape[:-1], weight.shape[-1] // size)
        codes = numpy.random.default_rng(bits).integers(0, 1 << bits, tuple(weight.shape))
        scales, biases = (torch.rand(shape) * 0.01).to(dtype), (torch.randn(shape)).to(dtype)
        return {"weight": packed(codes, bits), "scales": scales, "biases": biases}, codes

    return parts


def floats(mode):
    def parts(weight):
        table, kind, size = FLOATS[mode]
        random = numpy.random.default_rng(0)
        finite = numpy.flatnonzero(numpy.isfinite(table))
        codes = random.choice(finite, tuple(weight.shape))
        exponents = random.uniform(0.01, 0.1, (*weight.shape[:-1], weight.shape[-1] // size))
        scales = torch.from_numpy(exponents.astype(kind).view("u1"))
        return {"weight": packed(codes, 8 if mode == "mxfp8" else 4), "scales": scales}, codes

    return parts


def decoded(parts, codes, mode):
    """Return scale * code + bias, rounded once."""
    if mode != "affine":
        table, kind, size = FLOATS[mode]
        scales = parts["scales"].numpy().view(kind).astype("f8").repeat(size, axis=-1)
        return torch.from_numpy(table[codes] * scales).bfloat16()
    size = codes.shape[-1] // parts["scales"].shape[-1]
    scales, biases = (parts[n].double().numpy().repeat(size, -1) for n in ("scales", "biases"))
    exact = torch.from_numpy(scales * codes + biases).float()
    return exact.to(torch.float16 if parts["scales"].dtype == torch.float16 else torch.bfloat16)


def write(source, target, parts_of, mode="affine", **settings):
    """Write a model as mlx-lm does, and return its weights, by their names in the original."""
    wanted = {}

    def parts(weight):
        made, codes = parts_of(weight)
        keep.append(decoded(made, codes, mode))
        return made

    keep = []
    modules = quantize(source, target, parts, {}, lambda name: name.endswith(CHOSEN))
    wanted |= {f"{owner}.weight": weight for owner, weight in zip(modules, keep, strict=True)}
    config = json.loads((target / "config.json").read_text())
    del config["quantization_config"]
    quantization = {"bits": 4, "group_size": 64, **settings}
    if mode != "affine":
        quantization = {"bits": 8 if mode == "mxfp8" else 4, "group_size": FLOATS[mode][2],
                        "mode": mode}  # fmt: skip
    config |= {"quantization": quantization, "quantization_config": quantization}
    (target / "config.json").write_text(json.dumps(config))
    stack(target)
    return wanted


CHOSEN = ("proj.weight", "embed_tokens.weight", "lm_head.weight")


def stack(path):
    """Join the experts of a layer, as mlx-lm does."""
    tensors, stacks = load_file(path / "model.safetensors"), {}
    for name in [name for name in tensors if ".experts." in name]:
        before, _, rest = name.partition(".experts.")
        number, _, last = rest.partition(".")
        stacks.setdefault(f"{before}.switch_mlp.{last}", {})[int(number)] = tensors.pop(name)
    for name, experts in stacks.items():
        tensors[name] = torch.stack([experts[n] for n in sorted(experts)])
    save_file(tensors, path / "model.safetensors", {"format": "mlx"})


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return make_models(tmp_path_factory.mktemp("models"))


CASES = [
    *(("llama", f"MLX int{bits}", affine(bits, 32 if bits == 3 else 64),
       {"bits": bits, "group_size": 32 if bits == 3 else 64}) for bits in (1, 2, 3, 4, 5, 6, 8)),
    ("llama", "MLX int4", affine(4, 64, torch.bfloat16), {}),
    ("moe", "MLX int4", affine(), {}),
    *(("llama", f"MLX {mode}", floats(mode), {"mode": mode}) for mode in FLOATS),
    ("moe", "MLX mxfp4", floats("mxfp4"), {"mode": "mxfp4"}),
]  # fmt: skip


@pytest.mark.parametrize(("source", "named", "parts", "settings"), CASES)
def test_what_is_documented(models, tmp_path, source, named, parts, settings):
    wanted = write(models / source, tmp_path / "m", parts, **settings)
    assert plugins.sniff(tmp_path / "m").name == "mlx"
    convert(tmp_path / "m", tmp_path / "out", to_format="safetensors", dtype=None)
    found = load_file(tmp_path / "out/model.safetensors")
    original = load_file(models / source / "model.safetensors")
    assert found.keys() == original.keys()
    for name, weight in (original | wanted).items():
        assert found[name].dtype == weight.dtype and torch.equal(found[name], weight), name
    config = (tmp_path / "out/config.json").read_text()
    assert '"quantization' not in config
    if named not in ("MLX int4", "MLX mxfp4"):
        return
    for target in ("bundle", "q8.gguf"):
        report = convert(
            tmp_path / "m", tmp_path / target, dtype=None if target == "bundle" else "q8_0"
        )
        assert [step.types for step in report.quantized_before] == [{named: len(wanted)}]


def test_modules_with_settings_of_their_own(models, tmp_path):
    """By their paths, as mlx-lm's predicates give routers and some layers more bits."""
    wanted = write(models / "llama", tmp_path / "m", affine())
    made, codes = affine(8, 32)(torch.zeros(64, 64))
    change(tmp_path / "m", lambda t: t.update({f"{Q}.{n}": part for n, part in made.items()}),
           **{Q: {"bits": 8, "group_size": 32}})  # fmt: skip
    convert(tmp_path / "m", tmp_path / "out", to_format="safetensors")
    found = load_file(tmp_path / "out/model.safetensors")
    assert torch.equal(found[f"{Q}.weight"], decoded(made, codes, "affine"))
    other = Q.replace("q_proj", "o_proj") + ".weight"
    assert torch.equal(found[other], wanted[other])


@pytest.mark.parametrize("mode", ["affine", "mxfp4"])
def test_some_rows_of_an_expert(models, tmp_path, mode):
    write(models / "moe", tmp_path / "m", affine(3) if mode == "affine" else floats(mode), mode,
          **({"bits": 3} if mode == "affine" else {}))  # fmt: skip
    with plugins.sniff(tmp_path / "m").read(tmp_path / "m", plugins.ReadOptions()) as model:
        tensor = model.tensors["model.layers.0.mlp.experts.2.up_proj.weight"]
        whole = tensor.array()
        for start, stop in [(0, 64), (63, 64), (5, 9), (7, 7)]:
            assert tensor.rows(start, stop).tobytes() == whole[start:stop].tobytes()


def test_the_first_config_of_mlx(models, tmp_path):
    """It has ``quantization`` alone."""
    write(models / "llama", tmp_path / "m", affine())
    config = json.loads((tmp_path / "m/config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "m/config.json").write_text(json.dumps(config))
    assert convert(tmp_path / "m", tmp_path / "bundle").source_format == "mlx"
    assert "group_size" not in (tmp_path / "bundle/config.json").read_text()


BAD = {
    "no scales": (without("scales"), {}, "scales is missing"),
    "no biases": (without("biases"), {}, "biases is missing"),
    "fewer scales": (replaced("scales", lambda t: t[:-1]), {}, "wanted .out, in . 4 / 32."),
    "more biases": (replaced("biases", lambda t: t.repeat(1, 2)), {}, "wanted .out, in . 4 / 32."),
    "scales of another type": (replaced("scales", lambda t: t.byte()), {}, "is U8"),
    "a vector": (replaced("weight", lambda t: t.flatten()), {}, "wanted .out, in . 4 / 32."),
    "groups that do not divide": (replaced("weight", lambda t: t[:, :-1]), {}, "equally many"),
    "another group size": (None, {"group_size": 32}, "equally many groups"),
    "a group size that is none": (None, {"group_size": 48}, "groups of 48"),
    "unknown bits": (None, {"bits": 7}, "has 7 bits"),
    "bits that are no number": (None, {"bits": "four"}, "bits in mode affine|has four bits"),
    "an unknown mode": (None, {"mode": "nf4"}, "mode nf4"),
    "a mode that is no word": (None, {"mode": ["affine"]}, "and mode "),
    "a mode of other codes": (None, {"mode": "mxfp4", "group_size": 32}, "is F16"),
    "a tensor more": (
        lambda t: t.update({f"{Q}.global_scale": torch.ones(1)}), {}, "global_scale belongs to"),
    "a module of MLX's own": (
        lambda t: t.update({Q.replace("q_proj", "embed_q.weight"): torch.ones(2, 2)}), {},
        "embed_q.weight., which MLX stores in another form"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", BAD)
def test_wrong_input_is_refused(models, tmp_path, wrong):
    edit, more, said = BAD[wrong]
    write(models / "llama", tmp_path / "m", affine())
    change(tmp_path / "m", edit, **more)
    check_refused(tmp_path / "m", tmp_path / "out", said, from_format="mlx")


@pytest.mark.parametrize(
    ("edit", "said"),
    [(lambda t: t[:-1], "the same number of experts"), (lambda t: t[0], "the same number of"),
     (lambda t: t.half(), "is F16")],
)  # fmt: skip
def test_stacks_of_experts_that_do_not_fit(models, tmp_path, edit, said):
    write(models / "moe", tmp_path / "m", affine())
    name = "model.layers.0.mlp.switch_mlp.up_proj.weight"
    change(tmp_path / "m", lambda t: t.update({name: edit(t[name])}))
    check_refused(tmp_path / "m", tmp_path / "out", said, from_format="mlx")


def test_models_that_mlx_changes_are_refused_by_their_type(models, tmp_path):
    write(models / "llama", tmp_path / "m", affine())
    config = json.loads((tmp_path / "m/config.json").read_text())
    (tmp_path / "m/config.json").write_text(json.dumps(config | {"model_type": "qwen3_next"}))
    check_refused(tmp_path / "m", tmp_path / "out", "of type qwen3_next, which MLX stores")
