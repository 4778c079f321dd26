"""A program: DeepSpeed saves a checkpoint of a PEFT model, one process of two, without a GPU.

Arguments: the base, the stage of ZeRO, the checkpoint's directory, where the adapter shall stand as
PEFT itself saves it (by the first process, before anything is sharded), and a file for the
rendezvous of both.
"""

import os
import sys

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

base, stage, checkpoint, saved, meeting = sys.argv[1:]
torch.distributed.init_process_group(
    "gloo", f"file://{meeting}", rank=int(os.environ["RANK"]), world_size=2
)
deepspeed.init_distributed("gloo")
torch.manual_seed(0)
config = LoraConfig(
    r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"],
    init_lora_weights=False, task_type="CAUSAL_LM",
)  # fmt: skip
model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
torch.nn.init.normal_(model.base_model.model.lm_head.modules_to_save["default"].weight, std=0.05)
if os.environ["RANK"] == "0":
    model.save_pretrained(saved)
engine, *_ = deepspeed.initialize(
    model=model,
    model_parameters=[p for p in model.parameters() if p.requires_grad],
    config={
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": int(stage)},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    },
)
engine.save_checkpoint(checkpoint)
