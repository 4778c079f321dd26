"""Advice on exporting adapters from sharded training (DeepSpeed, FSDP)."""

from __future__ import annotations

__all__ = ["CONSOLIDATE", "GATHER"]

#: The checkpoint's own script writes one file; names in it carry PEFT's adapter name, as read here.
CONSOLIDATE = (
    "python zero_to_fp32.py CHECKPOINT OUT --safe_serialization --exclude_frozen_parameters (the "
    "script is in the checkpoint directory), then rename OUT/model.safetensors to "
    "adapter_model.safetensors and put the run's adapter_config.json beside it"
)

#: What fixes a file of empty tensors, or of none.
GATHER = (
    "gather and save again: with stage3_gather_16bit_weights_on_model_save (accelerate: "
    f"zero3_save_16bit_model) in the DeepSpeed config; or, out of a checkpoint: {CONSOLIDATE}"
)
