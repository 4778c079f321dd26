"""Times ``loraformat merge`` against PEFT and against a plain copy.

A model in the exact shape of Llama-3.2-1B with random bf16 weights, and an adapter of rank
16 on all linears. The plain copy reads the model and writes as many bytes, with an fsync:
nothing that does the same job can be faster. Also the undo record: its cost and its size.

Example: python tools/bench/merge.py --runs 3 --json merge.json
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import click
import torch
from safetensors.torch import save_file

sys.path.insert(0, os.fspath(Path(__file__).parent))

from process import Cost, machine, median_cost, run_python
from shapes import LLAMA_1B, Shape, write_model

_RANK = 16
_DEVIATION = 0.01

_COPY = """
import os, sys
buffer = bytearray(8 << 20)
with open(sys.argv[1], "rb", buffering=0) as file, open(sys.argv[2], "wb", buffering=0) as copy:
    while count := file.readinto(buffer):
        copy.write(memoryview(buffer)[:count])
    os.fsync(copy.fileno())
"""

_PEER = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
PeftModel.from_pretrained(model, sys.argv[2]).merge_and_unload().save_pretrained(sys.argv[3])
"""


@click.command()
@click.option("--directory", type=click.Path(path_type=Path), help="Where to keep the model.")
@click.option("--runs", default=3, show_default=True)
@click.option("--peer/--no-peer", default=True, help="Also run PEFT.")
@click.option("--json", "json_path", type=click.Path(path_type=Path))
def main(directory: Path | None, runs: int, peer: bool, json_path: Path | None) -> None:
    """Measure, print a table, write JSON."""
    with tempfile.TemporaryDirectory() as scratch:
        root = directory or Path(scratch)
        model = write_model(LLAMA_1B, root / LLAMA_1B.name)
        adapter = write_adapter(LLAMA_1B, Path(scratch) / "adapter")
        results, undo_bytes = _measure(model, adapter, Path(scratch), runs, peer)
    _report(results, undo_bytes, json_path)


def write_adapter(shape: Shape, directory: Path) -> Path:
    """Write a PEFT adapter with random factors for every linear of the layers."""
    directory.mkdir()
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, dimensions in shape.tensors():
        if name.endswith("_proj.weight"):
            out, inputs = dimensions
            prefix = f"base_model.model.{name.removesuffix('.weight')}"
            a = torch.randn(_RANK, inputs, generator=generator) * _DEVIATION
            b = torch.randn(out, _RANK, generator=generator) * _DEVIATION
            tensors[f"{prefix}.lora_A.weight"], tensors[f"{prefix}.lora_B.weight"] = a, b
    save_file(tensors, directory / "adapter_model.safetensors", {"format": "pt"})
    targets = sorted({name.split(".")[-3] for name in tensors})
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": _RANK, "lora_alpha": _RANK,
        "target_modules": targets, "base_model_name_or_path": shape.name, "bias": "none",
    }  # fmt: skip
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2))
    return directory


def _measure(
    model: Path, adapter: Path, scratch: Path, runs: int, peer: bool
) -> tuple[dict[str, Cost], int]:
    out, undo, back = scratch / "out", scratch / "undo.lfu", scratch / "back"
    verb = ["-m", "loraformat", "merge", model, adapter, "-o", out, "--quiet"]
    jobs = {
        "loraformat merge": verb,
        "loraformat merge --undo": [*verb, "--undo", undo],
        "plain copy": ["-c", _COPY, model / "model.safetensors", scratch / "copy"],
    }
    if peer:
        jobs["PEFT load, merge_and_unload, save"] = ["-c", _PEER, model, adapter, out]
    costs: dict[str, list[Cost]] = {name: [] for name in jobs}
    nbytes = 0
    for run in range(runs + 1):  # the first warms the page cache and is not counted
        for name, arguments in jobs.items():
            cost = run_python([str(argument) for argument in arguments])
            if run:
                costs[name].append(cost)
            if undo.exists():
                nbytes = undo.stat().st_size
                if run == runs:
                    undoing = ["-m", "loraformat", "unmerge", out, "--undo", undo, "-o", back, "-q"]
                    cost = run_python([str(argument) for argument in undoing])
                    costs["loraformat unmerge --undo"] = [cost]
                undo.unlink()
            shutil.rmtree(out, ignore_errors=True)
    return {name: median_cost(measured) for name, measured in costs.items()}, nbytes


def _report(results: dict[str, Cost], undo_bytes: int, json_path: Path | None) -> None:
    ours = results["loraformat merge"]
    about = machine()
    click.echo(", ".join(f"{key}: {value}" for key, value in about.items()))
    click.echo(f"{'':38}{'wall s':>8}{'CPU s':>8}{'anon MB':>9}{'RSS MB':>8}{'wall / ours':>13}")
    for name, cost in results.items():
        click.echo(
            f"{name:38}{cost.wall:8.2f}{cost.cpu:8.2f}{cost.anonymous / 1e6:9.0f}"
            f"{cost.resident / 1e6:8.0f}{cost.wall / ours.wall:13.2f}"
        )
    merged = sum(
        int(torch.Size(dimensions).numel())
        for name, dimensions in LLAMA_1B.tensors()
        if name.endswith("_proj.weight")
    )
    bits = 8 * undo_bytes / merged
    click.echo(f"undo record: {undo_bytes / 1e6:.2f} MB, {bits:.4f} bits per merged weight")
    if json_path:
        rows = {name: cost.to_json() for name, cost in results.items()}
        members = {"machine": about, "results": rows, "undo_bytes": undo_bytes}
        json_path.write_text(json.dumps(members, indent=2) + "\n")


if __name__ == "__main__":
    main()
