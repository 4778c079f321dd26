"""A bundle runs in transformers, whatever it was made of: one type, where a class wants that.

In train mode: bitsandbytes on a CPU rewrites 4-bit weights when a model in eval mode runs.
"""

from __future__ import annotations

import json
import logging
import shutil

import pytest
import torch
import transformers
from bases import MODELS, auto_class, make_base
from rewriting import rewrite
from safetensors.torch import load_file, save_file

import loraformat.transformers  # noqa: F401  opens mixtures of experts
from loraformat.families.table import family_of
from loraformat.ops.convert.convert import convert
from loraformat.ops.merge.merge import merge
from tests.tiny_models import ARCHITECTURES, WIDE, build, make_model

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

#: A model for each model type that the GGUF reader gives.
KINDS = (
    "llama-biases", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma2", "gemma3_text",
    "phi3", "gpt2", "bert",
)  # fmt: skip
IDS = torch.arange(40, 60)[None]
#: A model of each type that generates from text alone.
CAUSAL = [name for name in ARCHITECTURES if "-" not in name and name not in ("bert", "gemma3")]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    made = {}

    def make(name):
        if name not in made:
            path = tmp_path_factory.mktemp("forward") / name
            sizes = {key: value for key, value in WIDE.items() if key in MODELS[name]}
            made[name] = make_base(name, path, **sizes)
        return made[name]

    return make


def forward(path, name, **options):
    model = auto_class(name).from_pretrained(path, **options).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    with torch.no_grad():
        output = model(IDS)
    return output.last_hidden_state if name == "bert" else output.logits


def mixed(source, target):
    """Write weights in BF16 beside vectors in F32, as some trainers do."""
    target.mkdir()
    tensors = load_file(source / "model.safetensors")
    tensors = {n: t.bfloat16() if t.ndim > 1 else t for n, t in tensors.items()}
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_bytes())
    (target / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    return target


def made_of(kind, source, folder):
    """Write the source of a kind."""
    if kind == "dense":
        return source
    if kind == "dense, mixed":
        return mixed(source, folder / "mixed")
    if kind == "bitsandbytes":
        convert(mixed(source, folder / "mixed"), folder / "bnb", to_format="bitsandbytes")
        return folder / "bnb"
    whole = folder / "whole.gguf"
    convert(source, whole, dtype=kind)
    return rewrite(whole, folder / "model.gguf", drop=("loraformat.",))  # as others write it


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(
    "kind", ["f32", "f16", "bf16", "q8_0", "q4_1", "dense", "dense, mixed", "bitsandbytes"]
)
def test_a_bundle_runs(base, name, kind, tmp_path):
    source = made_of(kind, base(name), tmp_path)
    convert(source, tmp_path / "bundle")
    found = forward(tmp_path / "bundle", name)
    types = {"f16": torch.float16, "f32": torch.float32, "dense": torch.float32}
    assert found.dtype == types.get(kind, torch.bfloat16)
    convert(tmp_path / "bundle", tmp_path / "stored", to_format="safetensors", dtype="f32")
    wanted = forward(tmp_path / "stored", name, dtype=torch.float32)
    most = {torch.float32: 2e-3, torch.float16: 2e-2, torch.bfloat16: 0.12}[found.dtype]
    assert float((found.float() - wanted).norm() / wanted.norm()) < most
    stored = load_file(next((tmp_path / "bundle").glob("*.safetensors")))
    parts = ("quant", "absmax", "nested")
    dense = {t.dtype for n, t in stored.items()
             if t.is_floating_point() and not any(part in n for part in parts)}  # fmt: skip
    casts = name.startswith("gemma") and kind != "dense"
    assert len(dense) == 1 or casts, "norms of Gemma are exact in F32, and its class casts"


def test_what_it_costs_is_said(base, tmp_path):
    source = base("llama-biases")
    convert(source, tmp_path / "model.gguf", dtype="bf16")
    (note,) = [n for n in convert(tmp_path / "model.gguf", tmp_path / "one").notes if "BF16" in n]
    assert "relative rounding error up to 0.0038 of a number" in note, "of norms that are not BF16"
    assert "--dtype f32 is exact" in note
    report = convert(tmp_path / "model.gguf", tmp_path / "exact", dtype="f32")
    assert not any("norms" in one for one in report.notes)
    tensors = load_file(source / "model.safetensors")
    tensors = {key: value.bfloat16().float() for key, value in tensors.items()}
    trained = shutil.copytree(source, tmp_path / "trained")
    save_file(tensors, trained / "model.safetensors", {"format": "pt"})
    convert(trained, tmp_path / "trained.gguf", dtype="bf16")
    (note,) = [n for n in convert(tmp_path / "trained.gguf", tmp_path / "two").notes if "BF16" in n]
    assert "without a loss" in note
    planned = convert(tmp_path / "trained.gguf", tmp_path / "three", dry_run=True)
    assert any("become BF16" in one for one in planned.notes)


def test_merged_and_quantized_again_it_runs_too(base, tmp_path):
    import peft

    model = transformers.AutoModelForCausalLM.from_pretrained(base("llama-biases"))
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    convert(base("llama-biases"), tmp_path / "model.gguf", dtype="bf16")
    report = merge(tmp_path / "model.gguf", [tmp_path / "adapter"], tmp_path / "bundle",
                   to="loraformat", requantize=True, dtype="bf16")  # fmt: skip
    assert report.merged
    assert forward(tmp_path / "bundle", "llama-biases").dtype == torch.bfloat16
    mixed(base("llama-biases"), tmp_path / "mixed")
    report = merge(tmp_path / "mixed", [tmp_path / "adapter"], tmp_path / "again",
                   to="loraformat", requantize=True)  # fmt: skip
    assert any("became BF16" in note for note in report.notes)
    assert forward(tmp_path / "again", "llama-biases").dtype == torch.bfloat16


@pytest.mark.parametrize("kind", CAUSAL)
def test_which_classes_want_one_type(kind):
    """In 16 bits, with vectors in F32: those that multiply them stop, those that cast go on."""
    model = build(kind, dtype=torch.bfloat16)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data = parameter.data.float()
    try:
        with torch.no_grad():
            model(IDS)
        runs = True
    except RuntimeError as error:
        assert "dtype" in str(error)
        runs = False
    said = family_of({"model_type": kind}).one_type
    assert said is None or said is not runs
    assert said is not None or kind in ("gpt_oss", "mamba"), "they keep some in F32 on purpose"


def test_of_other_classes_it_is_said(tmp_path):
    make_model("gpt_oss", tmp_path / "dense")
    report = convert(mixed(tmp_path / "dense", tmp_path / "mixed"), tmp_path / "bundle")
    assert any("if transformers cannot mix both" in note for note in report.notes)
    report = convert(tmp_path / "mixed", tmp_path / "one", dtype="bf16")
    assert not any("cannot mix both" in note for note in report.notes), report.notes
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "one").train()
    assert model(IDS).logits.isfinite().all()
