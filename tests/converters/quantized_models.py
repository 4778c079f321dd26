"""Tiny models for tests of quantized checkpoints, and what their conversions must be."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from loraformat import plugins
from loraformat.demo import SMALL_MODEL
from loraformat.errors import InputError, UnsupportedError
from loraformat.ops.convert.convert import convert
from loraformat.testing import contents

_SIZES = dict(
    hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=2, vocab_size=2048,
)  # fmt: skip


#: The module whose parts tests change.
Q = "model.layers.0.self_attn.q_proj"
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


def tiny(path, kind="llama", *, tied=False):
    """Save a dense model in BF16 and return its tensors."""
    torch.manual_seed(0)
    if kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(**_SIZES, tie_word_embeddings=tied))
    else:
        config = Qwen3MoeConfig(
            **_SIZES, head_dim=16, moe_intermediate_size=64, num_experts=4, num_experts_per_tok=2,
            norm_topk_prob=True, tie_word_embeddings=tied,
        )  # fmt: skip
        model = Qwen3MoeForCausalLM(config)
    model.bfloat16().save_pretrained(path)
    for name in _TOKENIZER:
        shutil.copy(SMALL_MODEL / name, path)
    return load_file(path / "model.safetensors")


def make_models(top):
    """Save the dense models, each in a directory of its name: llama, moe, tied."""
    for kind in ("llama", "moe"):
        tiny(top / kind, kind)
    tiny(top / "tied", tied=True)
    return top


def quantize(source, target, parts_of, settings, chosen=lambda name: "proj.weight" in name):
    """Write a model whose chosen weights are replaced by ``parts_of(weight)``, by suffix.

    Returns
    -------
    dict
        The parts by the module's name.
    """
    shutil.copytree(source, target)
    stored, modules = {}, {}
    for name, weight in load_file(source / "model.safetensors").items():
        if not chosen(name):
            stored[name] = weight
            continue
        owner = name.removesuffix(".weight")
        modules[owner] = parts_of(weight)
        stored |= {f"{owner}.{suffix}": part for suffix, part in modules[owner].items()}
    save_file(stored, target / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    return modules


def change(path, edit=None, **settings):
    """Edit the tensors, or the members of the quantization's settings, of a checkpoint."""
    if edit is not None:
        tensors = load_file(path / "model.safetensors")
        edit(tensors)
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] |= settings
    (path / "config.json").write_text(json.dumps(config))
    return path


def without(suffix):
    """Return an edit that drops a part of one weight."""
    return lambda tensors: tensors.pop(f"{Q}.{suffix}")


def replaced(suffix, edit):
    """Return an edit that changes a part of one weight."""

    def edited(tensors):
        tensors[f"{Q}.{suffix}"] = edit(tensors[f"{Q}.{suffix}"]).contiguous()

    return edited


def check_refused(source, target, said, **options):
    """A conversion ends with one line that says what to do, and writes nothing."""
    with pytest.raises((InputError, UnsupportedError), match=said) as refused:
        convert(source, target, to_format="safetensors", **options)
    assert refused.value.hint and "\n" not in str(refused.value)
    assert not target.exists()


def check_conversions(source, wanted, top, *, count, named):
    """Compare conversions to every target with those of the dense model that is wanted.

    Parameters
    ----------
    source : Path
        The quantized checkpoint.
    wanted : dict of str to Tensor
        What its weights are, by name; its other tensors stay as they are.
    top : Path
        Where to write.
    count, named
        How many weights a report says were quantized before, and as what.
    """
    dense = shutil.copytree(source, top / "dense")
    kept = {
        name: tensor for name, tensor in load_file(source / "model.safetensors").items()
        if not name.startswith(tuple(weight.removesuffix("weight") for weight in wanted))
    }  # fmt: skip
    save_file(kept | wanted, dense / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config.pop("quantization_config")
    (dense / "config.json").write_text(json.dumps(config))
    for dtype, target in {None: "plain", "f32": "wide"}.items():
        convert(source, top / target, to_format="safetensors", dtype=dtype)
        found = load_file(top / target / "model.safetensors")
        assert found.keys() == kept.keys() | wanted.keys()
        for name, tensor in (kept | wanted).items():
            assert found[name].dtype == (torch.float32 if dtype else tensor.dtype), name
            assert torch.equal(found[name].to(tensor.dtype), tensor), name
        assert "quantization_config" not in (top / target / "config.json").read_text()
    for target, dtype, same in [("bundle", None, dense), ("q8.gguf", "q8_0", top / "wide")]:
        report = convert(source, top / target, dtype=dtype)
        assert [step.types for step in report.quantized_before] == [{named: count}]
        said = f"already quantized: the source's weights were {named} ({count} weights"
        assert any(said in note for note in report.notes), report.notes
        convert(same, top / f"dense-{target}", dtype=dtype)
        assert loaded(top / target) == loaded(top / f"dense-{target}"), target


def loaded(path):
    """Return all tensors of a model as they are stored."""
    with plugins.sniff(path).read(path, plugins.ReadOptions()) as model:
        return contents(model)
