"""Small bases, and adapters in memory that change them."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from loraformat.model.adapter import Adapter, LoraDelta
from loraformat.testing import dense

TYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def gauss(*shape, seed=0, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def save_model(path, tensors, config=None):
    path.mkdir()
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    text = config or {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (path / "config.json").write_text(json.dumps(text))
    return path


def weights_of(path):
    found = {}
    for file in sorted(Path(path).glob("*.safetensors")):
        found |= load_file(file)
    return found


def delta(name, out, into, rank=4, seed=1, scale=0.05, scaling=2.0, **options):
    a = dense(
        f"{name}.a",
        options.pop("a", None) if "a" in options else gauss(rank, into, seed=seed, scale=scale),
    )
    b = dense(
        f"{name}.b",
        options.pop("b", None) if "b" in options else gauss(out, rank, seed=seed + 1, scale=scale),
    )
    return LoraDelta(name, a, b, scaling, **options)


def adapter(*deltas, **options):
    return Adapter(Path("memory"), "peft", {d.target: d for d in deltas}, **options)


Q = "model.layers.0.self_attn.q_proj.weight"
K = "model.layers.0.self_attn.k_proj.weight"
EMBED = "model.embed_tokens.weight"


def small(tmp_path, dtype=torch.float32, **config):
    tensors = {
        EMBED: gauss(10, 32, seed=7).to(dtype),
        Q: gauss(32, 32, seed=8).to(dtype),
        K: gauss(16, 32, seed=9).to(dtype),
        "model.norm.weight": torch.ones(32).to(dtype),
    }
    head = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    return save_model(tmp_path / "base", tensors, head | config), tensors
