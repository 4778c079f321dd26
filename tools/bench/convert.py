"""Times ``loraformat convert`` against a plain copy and against transformers + bitsandbytes.

One run, interleaved, on a model in the exact shape of Llama-3.2-1B with random bf16
weights. The plain copy reads the input and writes as many bytes as the bundle has, with
an fsync: nothing that does the same job can be faster.

Example: python tools/bench/convert.py --runs 3 --json convert.json
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

sys.path.insert(0, os.fspath(Path(__file__).parent))

from process import Cost, machine, median_cost, run_python
from shapes import LLAMA_1B, write_model

_OURS, _COPY_ROW, _TWICE = "loraformat convert", "plain copy", ", twice the layers"
_COPY = """
import os, sys
source, target, *shards = sys.argv[1:]
buffer = bytearray(8 << 20)
with open(source, "rb", buffering=0) as file:
    while file.readinto(buffer):
        pass
with open(target, "wb", buffering=0) as copy:
    for shard in shards:
        with open(shard, "rb", buffering=0) as file:
            while count := file.readinto(buffer):
                copy.write(memoryview(buffer)[:count])
    os.fsync(copy.fileno())
"""

_PEER = """
import sys, torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
settings = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
)
model = AutoModelForCausalLM.from_pretrained(
    sys.argv[1], quantization_config=settings, dtype=torch.bfloat16
)
model.save_pretrained(sys.argv[2])
"""


@click.command()
@click.option("--directory", type=click.Path(path_type=Path), help="Where to keep the models.")
@click.option("--runs", default=3, show_default=True)
@click.option("--peer/--no-peer", default=True, help="Also run transformers + bitsandbytes.")
@click.option("--json", "json_path", type=click.Path(path_type=Path))
def main(directory: Path | None, runs: int, peer: bool, json_path: Path | None) -> None:
    """Measure, print a table, write JSON."""
    with tempfile.TemporaryDirectory() as scratch:
        root = directory or Path(scratch)
        model = write_model(LLAMA_1B, root / LLAMA_1B.name)
        larger = replace(LLAMA_1B, name="llama-1b-twice", layers=2 * LLAMA_1B.layers)
        twice = write_model(larger, root / larger.name)
        results = _measure(model, twice, Path(scratch), runs, peer)
    _report(results, json_path)


def _measure(model: Path, twice: Path, scratch: Path, runs: int, peer: bool) -> dict[str, Cost]:
    costs: dict[str, list[Cost]] = {}
    for run in range(runs + 1):  # the first warms the page cache and is not counted
        for source, suffix in ((model, ""), (twice, _TWICE)):
            ours, copied = _convert_and_copy(source, scratch)
            costs.setdefault(_OURS + suffix, []).append(ours)
            costs.setdefault(_COPY_ROW + suffix, []).append(copied)
        if peer and run < 2:  # one counted run: it takes minutes
            target = scratch / "peer"
            cost = run_python(["-c", _PEER, os.fspath(model), os.fspath(target)])
            costs.setdefault("transformers + bitsandbytes", []).append(cost)
            shutil.rmtree(target)
    return {name: median_cost(measured[1:]) for name, measured in costs.items()}


def _convert_and_copy(model: Path, scratch: Path) -> tuple[Cost, Cost]:
    bundle, copy = scratch / "bundle", scratch / "copy"
    ours = _convert(model, bundle)
    shards = [os.fspath(path) for path in sorted(bundle.glob("*.safetensors"))]
    arguments = ["-c", _COPY, os.fspath(model / "model.safetensors"), os.fspath(copy), *shards]
    copied = run_python(arguments)
    shutil.rmtree(bundle)
    copy.unlink()
    return ours, copied


def _convert(model: Path, bundle: Path) -> Cost:
    return run_python(
        ["-m", "loraformat", "convert", os.fspath(model), os.fspath(bundle), "--quiet"]
    )


def _report(results: dict[str, Cost], json_path: Path | None) -> None:
    about = machine()
    click.echo(", ".join(f"{key}: {value}" for key, value in about.items()))
    click.echo(f"{'':38}{'wall s':>8}{'CPU s':>8}{'anon MB':>9}{'RSS MB':>8}{'ours / this':>13}")
    for name, cost in sorted(results.items(), key=lambda item: _TWICE in item[0]):
        ours = results[_OURS + (_TWICE if name.endswith(_TWICE) else "")]
        click.echo(
            f"{name:38}{cost.wall:8.2f}{cost.cpu:8.2f}{cost.anonymous / 1e6:9.0f}"
            f"{cost.resident / 1e6:8.0f}{ours.wall / cost.wall:13.2f}"
        )
    if json_path:
        rows = {name: cost.to_json() for name, cost in results.items()}
        json_path.write_text(json.dumps({"machine": about, "results": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
