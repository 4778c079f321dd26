"""Every verb's plan on published models: 44 configs with the names and shapes of their files.

Where each is from stands in ``models.json``, and what that means in `tests.published.models`.
No weights are here; files of holes stand for them, so that what is planned is the real size.
"""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path

import pytest
import torch
from loraformat_converters.gguf.architectures import of_config, to_gguf
from safetensors.torch import save_file
from transformers.pytorch_utils import Conv1D

from loraformat.errors import LoraFormatError
from loraformat.families.table import family_of
from loraformat.model.base_names import names_of
from loraformat.model.base_names.meta_model import build_on_meta
from loraformat.model.base_names.sources import find_sources
from loraformat.ops.check.check import check
from loraformat.ops.convert.convert import convert
from loraformat.ops.merge.merge import merge
from loraformat.ops.opening.model import open_model
from tests.published.models import Published, published

MODELS = {one.name: one for one in published()}
#: Tensors in the same file that no parameter of the model takes.
BESIDE = {
    "google-bert/bert-base-uncased": r"bert\.pooler\.|cls\.seq_relationship\.",  # another task
    "openai-community/gpt2": r"h\.\d+\.attn\.bias",  # a mask
}
IN_GGUF = {
    "bert", "gemma2", "gemma3", "gemma3_text", "gpt2", "llama", "mistral", "mixtral", "phi3",
    "qwen2", "qwen3", "qwen3_moe",
}  # fmt: skip


@pytest.fixture(scope="module", params=MODELS)
def model(request) -> Published:
    return MODELS[request.param]


@pytest.fixture(scope="module")
def base(model, tmp_path_factory) -> Path:
    return model.write(tmp_path_factory.mktemp("published") / "base")


@functools.lru_cache(maxsize=1)
def in_memory(name: str):
    """The model as transformers has it, without weights."""
    return build_on_meta(MODELS[name].config)


def linears(name: str) -> dict[str, tuple[int, int]]:
    """Return in and out of what PEFT adapts with all-linear, but the head."""
    built = in_memory(name)
    head = built.get_output_embeddings()
    found = {}
    for module, one in built.named_modules():
        if one is head or not isinstance(one, torch.nn.Linear | Conv1D):
            continue
        rows, columns = one.weight.shape
        found[module] = (rows, columns) if isinstance(one, Conv1D) else (columns, rows)
    return found


def test_there_are_at_least_forty():
    assert len(MODELS) >= 40
    assert len({one.config["model_type"] for one in MODELS.values()}) > 30
    assert all(one.source for one in MODELS.values())


def test_every_parameter_is_made_of_the_files_tensors(model, base):
    """So the trainer finds its weights, and none of the file is left over."""
    built = in_memory(model.name)
    with open_model(base) as checkpoint:
        sources = find_sources(built, checkpoint.tensors)
    made = {*sources.single, *sources.stacked, *sources.chunks}
    assert not sources.computed
    tied = set(built.all_tied_weights_keys or {})
    assert {name for name, _ in built.named_parameters()} - made <= tied
    beside = re.compile(BESIDE.get(model.name, "(?!)"))
    assert not [name for name in sources.unused if not beside.match(name)]
    assert bool(sources.unused) == (model.name in BESIDE)


def test_names_of_all_linears_are_found_both_ways(model, base):
    family = family_of(model.config)
    with open_model(base) as checkpoint:
        names = names_of(checkpoint)
        for module, (inner, outer) in linears(model.name).items():
            if family.is_shared(module):  # stored once, and merging refuses its deltas
                continue
            found = names.parameter(f"{module}.weight")
            assert found is not None, module
            assert sorted(found.shape[-2:]) == sorted((inner, outer)), module
            if (stored := names.find(f"{module}.weight")) is not None:
                assert names.in_memory(stored) == f"{module}.weight"


def test_a_bundle_is_planned(model, base, tmp_path):
    report = convert(base, tmp_path / "bundle", dry_run=True)
    assert report.quantized >= 20
    assert not (tmp_path / "bundle").exists()


def test_a_gguf_file_is_planned(model, base):
    try:
        architecture, config = of_config(model.config)
    except LoraFormatError:
        assert model.config["model_type"] not in IN_GGUF
        return
    with open_model(base) as checkpoint:
        shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
    assert to_gguf(architecture, config, shapes).tensors


@pytest.fixture(scope="module")
def adapter(model, tmp_path_factory) -> Path:
    """An adapter of rank 1 of a linear of each kind, as PEFT writes it."""
    family = family_of(model.config)
    refused = family.refused_leaves | family.expert_leaves | family.own_leaves
    kinds = {}
    for module, sizes in linears(model.name).items():
        leaf = module.rpartition(".")[2]
        if leaf not in refused and not family.is_shared(module):
            kinds.setdefault(leaf, (module, sizes))
    tensors = {}
    for module, (inner, outer) in kinds.values():
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.ones(1, inner)
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.ones(outer, 1)
    folder = tmp_path_factory.mktemp("adapter")
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {
        "peft_type": "LORA", "r": 1, "lora_alpha": 1, "fan_in_fan_out": family.conv1d,
        "target_modules": [module for module, _ in kinds.values()], "task_type": None,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_a_merge_is_planned(model, base, adapter, tmp_path):
    report = merge(base, [adapter], tmp_path / "merged", dry_run=True)
    changed = len(json.loads((adapter / "adapter_config.json").read_text())["target_modules"])
    assert report.merged == changed
    assert not (tmp_path / "merged").exists()


def test_check_says_that_it_loads(model, base, adapter):
    report = check(adapter, base=base, runtime=["transformers"])
    assert report.verdicts == {"transformers": "right"}, report.findings
