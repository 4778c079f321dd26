"""Adapters of a tiny llama, each with one thing that some runtime does not expect.

Written by hand, as PEFT writes them, so that each takes milliseconds: `FEATURES` names what
differs from a plain adapter on all seven linears.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from loraformat.demo import SMALL_MODEL

PREFIX = "base_model.model."
LAYERS, HIDDEN, INNER, ROWS, KEYS = 2, 64, 96, 96, 48
SHAPES = {
    "self_attn.q_proj": (ROWS, HIDDEN), "self_attn.k_proj": (KEYS, HIDDEN),
    "self_attn.v_proj": (KEYS, HIDDEN), "self_attn.o_proj": (HIDDEN, ROWS),
    "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}  # fmt: skip
LEAVES = [name.rpartition(".")[2] for name in SHAPES]
Tensors = dict[str, torch.Tensor]


def modules() -> dict[str, tuple[int, int]]:
    return {
        f"model.layers.{layer}.{name}": shape
        for layer in range(LAYERS)
        for name, shape in SHAPES.items()
    }


def factors(rank_of: Callable[[str], int] = lambda name: 8, seed: int = 0) -> Tensors:
    random = torch.Generator().manual_seed(seed)
    found = {}
    for name, (rows, columns) in modules().items():
        rank = rank_of(name)
        a = torch.randn(rank, columns, generator=random) * 0.1
        b = torch.randn(rows, rank, generator=random) * 0.1
        found[f"{PREFIX}{name}.lora_A.weight"] = a
        found[f"{PREFIX}{name}.lora_B.weight"] = b
    return found


def config(**changes: Any) -> dict[str, Any]:
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 16, "bias": "none",
        "base_model_name_or_path": "org/tiny-llama", "lora_dropout": 0.0, "use_rslora": False,
        "target_modules": LEAVES, "rank_pattern": {},
        "alpha_pattern": {}, "modules_to_save": None, "inference_mode": True,
        "peft_version": "0.21.2", "init_lora_weights": True, **changes,
    }  # fmt: skip


def _renamed(pattern: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {re.sub(pattern, new, name): t for name, t in tensors.items()}


def _without(pattern: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {n: t for n, t in tensors.items() if not re.search(pattern, n)}


def _with(**new: torch.Tensor) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {PREFIX + k.replace("__", "."): t for k, t in new.items()}


def _dora(tensors: Tensors) -> Tensors:
    return tensors | {
        f"{PREFIX}{name}.lora_magnitude_vector": torch.ones(shape[0])
        for name, shape in modules().items()
    }


def _nan(tensors: Tensors) -> Tensors:
    name = f"{PREFIX}model.layers.1.mlp.up_proj.lora_B.weight"
    changed = tensors[name].clone()
    changed[3, 2] = torch.nan
    return tensors | {name: changed}


def _zero(tensors: Tensors) -> Tensors:
    return {n: torch.zeros_like(t) if "lora_B" in n else t for n, t in tensors.items()}


def _more_tokens() -> str:
    """The tokenizer of the base, with one token behind the others."""
    tokenizer = json.loads((SMALL_MODEL / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append({"id": 2048, "content": "<|turn|>", "special": True})
    return json.dumps(tokenizer)


def _of_rank(rank: int) -> dict[str, Any]:
    return {"config": {"r": rank, "lora_alpha": rank}, "rank_of": lambda name: rank}


#: By name: changes of the config, ranks, changes of the tensors.
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"config": {"use_rslora": True}},
    "alpha_pattern": {"config": {"alpha_pattern": {"q_proj": 64, "layers.1.mlp.up_proj": 4}}},
    "rank_pattern": {
        "config": {"rank_pattern": {"k_proj": 2, "down_proj": 16}},
        "rank_of": lambda name: {"k_proj": 2, "down_proj": 16}.get(name.rpartition(".")[2], 8),
    },
    "all scalings": {
        "config": {"use_rslora": True, "rank_pattern": {"k_proj": 9},
                   "alpha_pattern": {"o_proj": 3.5}},
        "rank_of": lambda name: 9 if name.endswith("k_proj") else 8,
    },
    "float alpha": {"config": {"lora_alpha": 5.5}},
    "whole alpha as a float": {"config": {"lora_alpha": 16.0}},
    "alpha 0": {"config": {"lora_alpha": 0}},
    "rank 4": _of_rank(4),
    "rank 24": _of_rank(24),
    "rank 48": _of_rank(48),
    "rank 160": _of_rank(160),
    "rank 600": _of_rank(600),
    "dora": {"config": {"use_dora": True}, "change": _dora},
    "bias": {
        "config": {"bias": "lora_only"},
        "change": _with(model__layers__0__mlp__up_proj__base_layer__bias=torch.ones(INNER)),
    },
    "lora_bias": {
        "config": {"lora_bias": True},
        "change": _with(model__layers__0__mlp__up_proj__lora_B__bias=torch.ones(INNER)),
    },
    "trained norm": {
        "config": {"modules_to_save": ["model.norm"]},
        "change": _with(model__norm__weight=torch.ones(HIDDEN)),
    },
    "trained score": {
        "config": {"modules_to_save": ["score"], "task_type": "SEQ_CLS"},
        "change": _with(score__weight=torch.ones(2, HIDDEN)),
    },
    "trained tokens": {
        "config": {"trainable_token_indices": {"embed_tokens": [3, 4]}},
        "change": _with(
            model__embed_tokens__token_adapter__trainable_tokens_delta=torch.ones(2, HIDDEN)
        ),
    },
    "tokens beyond": {
        "config": {"trainable_token_indices": {"embed_tokens": [3, 2049]}},
        "change": _with(
            model__embed_tokens__token_adapter__trainable_tokens_delta=torch.ones(2, HIDDEN)
        ),
    },
    "grown head": {
        "config": {"target_modules": [*LEAVES, "lm_head"]},
        "change": _with(lm_head__lora_A__weight=torch.ones(8, HIDDEN),
                        lm_head__lora_B__weight=torch.ones(2052, 8)),
    },
    "pissa": {"config": {"init_lora_weights": "pissa_niter_4"}},
    "alora": {"config": {"alora_invocation_tokens": [5, 9]}},
    "loha": {"config": {"peft_type": "LOHA"}, "change": _renamed("lora_A", "hada_w1_a")},
    "kasa": {"config": {"kasa_config": {"rank": 8}}},
    "q without v": {"change": _without(r"v_proj")},
    "one layer": {"change": _without(r"layers\.1\.")},
    "half a pair": {"change": _without(r"layers\.1\.mlp\.up_proj\.lora_B")},
    "no prefix": {"change": _renamed(r"^base_model\.model\.", "")},
    "left-over default": {"change": _renamed(r"(lora_[AB])\.weight", r"\1.default.weight")},
    "compiled": {"change": _renamed(r"model\.layers", "_orig_mod.model.layers")},
    "shards": {"shards": True},
    "float64": {"change": lambda tensors: {n: t.double() for n, t in tensors.items()}},
    "nan": {"change": _nan},
    "zero": {"change": _zero},
    "unknown module": {"change": _renamed(r"mlp\.up_proj", "mlp.third_proj")},
    "other shape": {
        "change": _with(model__layers__0__mlp__up_proj__lora_B__weight=torch.ones(INNER + 8, 8))
    },
    "doubled prefix": {"change": _renamed(r"model\.layers", "model.model.layers")},
    "projector beside it": {"files": {"non_lora_trainables.bin": lambda: "PK"}},
    "never gathered": {
        "change": lambda tensors: {n: torch.zeros(0) for n in tensors},
    },
    "no tensors": {"change": lambda tensors: {}},
    "embedding": {
        "config": {"target_modules": [*LEAVES, "embed_tokens"]},
        "change": _with(model__embed_tokens__lora_embedding_A=torch.ones(8, 2048) * 0.1,
                        model__embed_tokens__lora_embedding_B=torch.ones(HIDDEN, 8) * 0.1),
    },
    "more tokens": {"files": {"tokenizer.json": _more_tokens}},
    "chat template": {"files": {"chat_template.jinja": lambda: "{{ messages[0].content }}"}},
    "head": {
        "config": {"target_modules": [*LEAVES, "lm_head"]},
        "change": _with(lm_head__lora_A__weight=torch.ones(8, HIDDEN),
                        lm_head__lora_B__weight=torch.ones(2048, 8)),
    },
}  # fmt: skip


def write(feature: str, folder: Path) -> Path:
    """Write an adapter with a feature to a new directory."""
    made = FEATURES[feature]
    folder.mkdir(parents=True)
    tensors = factors(made.get("rank_of", lambda name: 8))
    tensors = made.get("change", lambda same: same)(tensors)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if made.get("shards"):
        _write_shards(folder, tensors)
    else:
        save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    for name, content in made.get("files", {}).items():
        (folder / name).write_text(content())
    text = json.dumps(config(**made.get("config", {})), indent=2)
    (folder / "adapter_config.json").write_text(text)
    return folder


def _write_shards(folder: Path, tensors: Tensors) -> None:
    weight_map = {}
    names = sorted(tensors)
    for number in (1, 2):
        shard = f"adapter_model-0000{number}-of-00002.safetensors"
        part = {name: tensors[name] for name in names[number - 1 :: 2]}
        save_file(part, folder / shard, {"format": "pt"})
        weight_map |= dict.fromkeys(part, shard)
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "adapter_model.safetensors.index.json").write_text(json.dumps(index))
