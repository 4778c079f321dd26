"""Times ``loraformat merge`` against PEFT, mergekit and a plain copy.

A model in the exact shape of Llama-3.2-1B with random bf16 weights, one with twice the
layers, and an adapter of rank 16 on all linears for each. The plain copy reads the model and
writes as many bytes, with an fsync. All jobs are run one after the other, again and again, so
that what else the machine does meets all of them. Also the undo record: its cost and its size.

mergekit is run if its program is named: install it where loraformat's peers are, too.

Example: python tools/bench/merge.py --runs 3 --mergekit mergekit-yaml --json merge.json
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import click
import torch
from safetensors.torch import save_file

sys.path.insert(0, os.fspath(Path(__file__).parent))

from process import Cost, machine, median_cost, run_program, run_python
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


_DEEP = replace(LLAMA_1B, name="llama-1b-deep", layers=2 * LLAMA_1B.layers)
_Command = list[str | Path]
_OURS, _COPIED = "loraformat merge", "plain copy"


@click.command()
@click.option("--directory", type=click.Path(path_type=Path), help="Where to keep the models.")
@click.option("--runs", default=3, show_default=True)
@click.option("--peer/--no-peer", default=True, help="Also run PEFT.")
@click.option("--mergekit", help="Also run mergekit: its program mergekit-yaml.")
@click.option("--json", "json_path", type=click.Path(path_type=Path))
def main(
    directory: Path | None, runs: int, peer: bool, mergekit: str | None, json_path: Path | None
) -> None:
    """Measure, print a table, write JSON."""
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        jobs: dict[str, _Command] = {}
        for shape, note in ((LLAMA_1B, ""), (_DEEP, ", twice the layers")):
            model = write_model(shape, (directory or scratch) / shape.name)
            adapter = write_adapter(shape, scratch / f"{shape.name}-adapter")
            out = scratch / "out"
            verb: _Command = ["-m", "loraformat", "merge", model, adapter, "-o", out, "--quiet"]
            jobs[_OURS + note] = [sys.executable, *verb]
            copy: _Command = ["-c", _COPY, model / "model.safetensors", scratch / "out"]
            jobs[_COPIED + note] = [sys.executable, *copy]
            if note:
                continue
            jobs[_OURS + " --undo"] = [sys.executable, *verb, "--undo", scratch / "undo.lfu"]
            if peer:
                arguments: _Command = ["-c", _PEER, model, adapter, scratch / "out"]
                jobs["PEFT load, merge_and_unload, save"] = [sys.executable, *arguments]
            if mergekit:
                jobs["mergekit passthrough"] = _mergekit(mergekit, model, adapter, scratch)
        results, undo_bytes = _measure(jobs, scratch, runs)
    _report(results, undo_bytes, json_path)


def _mergekit(program: str, model: Path, adapter: Path, scratch: Path) -> _Command:
    plan = scratch / "mergekit.yml"
    plan.write_text(
        f"models:\n  - model: {model}+{adapter}\nmerge_method: passthrough\ndtype: bfloat16\n"
    )
    return [
        program, plan, scratch / "out", "--lora-merge-cache", scratch / "cache",
        "--no-copy-tokenizer", "--no-write-model-card",
    ]  # fmt: skip


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


def _measure(jobs: dict[str, _Command], scratch: Path, runs: int) -> tuple[dict[str, Cost], int]:
    out, undo, back = scratch / "out", scratch / "undo.lfu", scratch / "back"
    costs: dict[str, list[Cost]] = {name: [] for name in jobs}
    nbytes = 0
    for run in range(runs + 1):  # the first warms the page cache and is not counted
        for name, arguments in jobs.items():
            cost = run_program([str(argument) for argument in arguments])
            if run:
                costs[name].append(cost)
            if undo.exists():
                nbytes = undo.stat().st_size
                if run == runs:
                    undoing = ["-m", "loraformat", "unmerge", out, "--undo", undo, "-o", back, "-q"]
                    cost = run_python([str(argument) for argument in undoing])
                    costs["loraformat unmerge --undo"] = [cost]
                undo.unlink()
            shutil.rmtree(scratch / "cache", ignore_errors=True)  # mergekit writes a model there
            if out.is_dir():
                shutil.rmtree(out)
            else:
                out.unlink()
    return {name: median_cost(measured) for name, measured in costs.items()}, nbytes


def _report(results: dict[str, Cost], undo_bytes: int, json_path: Path | None) -> None:
    about = machine()
    click.echo(", ".join(f"{key}: {value}" for key, value in about.items()))
    head = (
        f"{'wall s':>8}{'CPU s':>8}{'anon MB':>9}{'RSS MB':>8}{'wall / ours':>13}{'CPU / ours':>12}"
    )
    click.echo(f"{'':38}{head}")
    for name, cost in results.items():
        ours = results[_OURS + name[name.index(",") :] if ", twice" in name else _OURS]
        click.echo(
            f"{name:38}{cost.wall:8.2f}{cost.cpu:8.2f}{cost.anonymous / 1e6:9.0f}"
            f"{cost.resident / 1e6:8.0f}{cost.wall / ours.wall:13.2f}{cost.cpu / ours.cpu:12.2f}"
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
