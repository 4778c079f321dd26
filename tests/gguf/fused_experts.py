"""A mixtral's tensors as transformers 5 has them in memory."""

from __future__ import annotations

import torch


def fuse(tensors: dict[str, torch.Tensor], layers: int = 2, experts: int = 4):
    """Put gate and up of all experts of a layer into one parameter, down into another."""
    tensors = dict(tensors)
    for layer in range(layers):
        block, moe = f"model.layers.{layer}.block_sparse_moe", f"model.layers.{layer}.mlp"
        gate, down, up = (
            torch.stack([tensors.pop(f"{block}.experts.{n}.{kind}.weight") for n in range(experts)])
            for kind in ("w1", "w2", "w3")
        )
        tensors[f"{moe}.experts.gate_up_proj"] = torch.cat([gate, up], 1)
        tensors[f"{moe}.experts.down_proj"] = down
        tensors[f"{moe}.gate.weight"] = tensors.pop(f"{block}.gate.weight")
    return tensors
