"""One adapter of experts in the layouts that tools write it in."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

RANK = 4
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
BOTH = {
    "target_modules": ["q_proj"],
    "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
}
Names = tuple[str, str, str]
QWEN: Names = ("gate_proj", "up_proj", "down_proj")
MIXTRAL: Names = ("w1", "w3", "w2")


def _linears(
    tensors: dict[str, torch.Tensor], experts: int, names: Names
) -> Iterator[tuple[str, str, str, torch.Tensor]]:
    """Yield module, linear, factor, and the factors (experts, ...) of PEFT's fused form."""
    gate, up, down = names
    for key, value in tensors.items():
        home, _, factor = key.partition(".lora_")
        if ".experts" not in key:
            continue
        stack = (
            value.view(experts, RANK, -1)
            if factor[0] == "A"
            else value.view(len(value), RANK, experts).permute(2, 0, 1)
        )
        if home.endswith(".base_layer"):
            halves = (stack, stack) if factor[0] == "A" else stack.chunk(2, 1)
            for name, half in zip((gate, up), halves, strict=True):
                yield home.removesuffix(".base_layer"), name, factor, half
        else:
            yield home, down, factor, stack


def _written(
    adapter: Path, out: Path, tensors: dict[str, torch.Tensor], modules: list[str]
) -> Path:
    out.mkdir()
    save_file({k: v.clone().contiguous() for k, v in tensors.items()}, out / WEIGHTS)
    config = json.loads((adapter / CONFIG).read_text())
    config |= {"target_parameters": None, "target_modules": modules}
    (out / CONFIG).write_text(json.dumps(config))
    return out


def one_by_one(adapter: Path, out: Path, experts: int, names: Names) -> Path:
    """Write it with a LoRA for each linear of each expert, as before experts were fused."""
    tensors = load_file(adapter / WEIGHTS)
    made = {key: value for key, value in tensors.items() if ".experts" not in key}
    for home, name, factor, stack in _linears(tensors, experts, names):
        made |= {f"{home}.{n}.{name}.lora_{factor}": part for n, part in enumerate(stack)}
    return _written(adapter, out, made, ["q_proj", *names])


def named_stacks(adapter: Path, out: Path, experts: int, *, shared: bool = False) -> Path:
    """Write it as SGLang's and vLLM's stacks w1, w2 and w3; shared: some factors of one expert."""
    tensors = load_file(adapter / WEIGHTS)
    made = {key: value for key, value in tensors.items() if ".experts" not in key}
    for home, name, factor, stack in _linears(tensors, experts, MIXTRAL):
        once = shared and factor[0] == ("B" if name == "w2" else "A")
        made[f"{home}.{name}.lora_{factor}"] = stack[:1] if once else stack
    return _written(adapter, out, made, ["q_proj", "experts"])


def with_shared_factors(adapter: Path, experts: int) -> None:
    """Give all experts of PEFT's fused form the first one's A of gate and up, and B of down."""
    tensors = load_file(adapter / WEIGHTS)
    for key, value in tensors.items():
        if ".experts.base_layer.lora_A" in key:
            tensors[key] = value[:RANK].repeat(experts, 1)
        elif ".experts.lora_B" in key:
            first = value.view(len(value), RANK, experts)[..., :1]
            tensors[key] = first.expand(-1, -1, experts).reshape(len(value), -1)
    save_file(tensors, adapter / WEIGHTS, {"format": "pt"})
