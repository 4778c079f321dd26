"""Models in the exact shapes of public ones, with seeded random weights, written as a stream."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from loraformat.tensors.header import Entry, encode_header

__all__ = ["LLAMA_1B", "LLAMA_8B", "LLAMA_70B", "QWEN3_30B_A3B", "MixtureShape", "Shape",
           "write_model"]  # fmt: skip

_INITIAL_DEVIATION = 0.02


@dataclass(frozen=True)
class Shape:
    """What decides the size of a llama."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool = True

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield every weight's name and shape; a tied head is the embedding."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        yield "model.embed_tokens.weight", (self.vocabulary, self.hidden)
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}."
            yield prefix + "input_layernorm.weight", (self.hidden,)
            yield prefix + "self_attn.q_proj.weight", (queries, self.hidden)
            yield prefix + "self_attn.k_proj.weight", (keys, self.hidden)
            yield prefix + "self_attn.v_proj.weight", (keys, self.hidden)
            yield prefix + "self_attn.o_proj.weight", (self.hidden, queries)
            yield prefix + "post_attention_layernorm.weight", (self.hidden,)
            yield prefix + "mlp.gate_proj.weight", (self.intermediate, self.hidden)
            yield prefix + "mlp.up_proj.weight", (self.intermediate, self.hidden)
            yield prefix + "mlp.down_proj.weight", (self.hidden, self.intermediate)
        yield "model.norm.weight", (self.hidden,)
        if not self.tied:
            yield "lm_head.weight", (self.vocabulary, self.hidden)

    def config(self) -> dict[str, object]:
        """Return its config.json."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "dtype": "bfloat16",
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "max_position_embeddings": 4096,
            "model_type": "llama",
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "rms_norm_eps": 1e-05,
            "tie_word_embeddings": self.tied,
            "vocab_size": self.vocabulary,
        }


@dataclass(frozen=True)
class MixtureShape:
    """What decides the size of a Qwen3 mixture of experts; every layer has experts."""

    name: str
    hidden: int
    expert: int
    experts: int
    routed: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield every weight's name and shape, as transformers names them; experts are stacks."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        yield "model.embed_tokens.weight", (self.vocabulary, self.hidden)
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}."
            yield prefix + "input_layernorm.weight", (self.hidden,)
            yield prefix + "self_attn.q_proj.weight", (queries, self.hidden)
            yield prefix + "self_attn.k_proj.weight", (keys, self.hidden)
            yield prefix + "self_attn.v_proj.weight", (keys, self.hidden)
            yield prefix + "self_attn.o_proj.weight", (self.hidden, queries)
            yield prefix + "self_attn.q_norm.weight", (self.head_dim,)
            yield prefix + "self_attn.k_norm.weight", (self.head_dim,)
            yield prefix + "post_attention_layernorm.weight", (self.hidden,)
            yield prefix + "mlp.gate.weight", (self.experts, self.hidden)
            sizes = self.experts, 2 * self.expert, self.hidden
            yield prefix + "mlp.experts.gate_up_proj", sizes
            yield prefix + "mlp.experts.down_proj", (self.experts, self.hidden, self.expert)
        yield "model.norm.weight", (self.hidden,)
        yield "lm_head.weight", (self.vocabulary, self.hidden)

    def config(self) -> dict[str, object]:
        """Return its config.json."""
        return {
            "architectures": ["Qwen3MoeForCausalLM"],
            "decoder_sparse_step": 1,
            "dtype": "bfloat16",
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": 3 * self.hidden,
            "max_position_embeddings": 32768,
            "mlp_only_layers": [],
            "model_type": "qwen3_moe",
            "moe_intermediate_size": self.expert,
            "norm_topk_prob": True,
            "num_attention_heads": self.heads,
            "num_experts": self.experts,
            "num_experts_per_tok": self.routed,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "rms_norm_eps": 1e-06,
            "tie_word_embeddings": False,
            "vocab_size": self.vocabulary,
        }


#: The shape of Llama-3.2-1B.
LLAMA_1B = Shape("llama-1b", 2048, 8192, 16, 32, 8, 64, 128256)

#: The shape of Llama-3.1-8B.
LLAMA_8B = Shape("llama-8b", 4096, 14336, 32, 32, 8, 128, 128256, tied=False)

#: The shape of Llama-3.1-70B.
LLAMA_70B = Shape("llama-70b", 8192, 28672, 80, 64, 8, 128, 128256, tied=False)

#: The shape of Qwen3-30B-A3B.
QWEN3_30B_A3B = MixtureShape("qwen3-30b-a3b", 2048, 768, 128, 8, 48, 32, 4, 128, 151936)


def write_model(shape: Shape, directory: Path) -> Path:
    """Write the model as one bfloat16 ``model.safetensors``; a directory that has one is kept.

    Parameters
    ----------
    shape : Shape
    directory : Path

    Returns
    -------
    Path
        The directory.
    """
    file_path = directory / "model.safetensors"
    if file_path.exists():
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(shape.config(), indent=2) + "\n")
    entries, position = [], 0
    for name, dimensions in shape.tensors():
        nbytes = 2 * int(torch.Size(dimensions).numel())
        entries.append(Entry(name, "BF16", dimensions, position, position + nbytes))
        position += nbytes
    generator = torch.Generator().manual_seed(0)
    unfinished = file_path.with_suffix(".unfinished")
    with unfinished.open("wb") as file:
        file.write(encode_header(entries, {"format": "pt"}))
        for entry in entries:
            weight = torch.empty(entry.shape, dtype=torch.bfloat16)
            weight.normal_(0.0, _INITIAL_DEVIATION, generator=generator)
            file.write(weight.view(torch.uint8).numpy().tobytes())
    unfinished.rename(file_path)
    return directory
