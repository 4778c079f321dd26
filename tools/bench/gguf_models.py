"""Times conversions between bundles and GGUF files, beside plain copies and other programs.

A model in the exact shape of Llama-3.2-1B with random weights (or fewer layers of it): out of an
NF4 bundle to F16 and Q8_0, and out of Q4_K and Q8_0 files into a bundle. A plain copy reads the
same input and writes as many bytes as the output has, with an fsync. All jobs are run one after
the other, again and again, so that what else the machine does meets all of them; the first round
only warms the page cache.

Example: python tools/bench/gguf_models.py --runs 2 --json gguf.json
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import click

sys.path.insert(0, os.fspath(Path(__file__).parent))

from ggml_oracle import quantize
from gguf_peers import COPY, DEQUANTIZE, FROM_NF4, TRANSFORMERS
from loraformat_converters.gguf.container.reader import GGUFFile, open_gguf
from loraformat_converters.gguf.container.types import GGMLType
from loraformat_converters.gguf.container.writer import PlannedTensor, write_gguf
from loraformat_converters.gguf.quantization.blocks import dequantize
from process import Cost, machine, median_cost, run_python
from shapes import LLAMA_1B, write_model

from loraformat.demo import SMALL_MODEL
from loraformat.ops.convert.convert import convert
from loraformat.storage.atomic_file import open_publication

_QUANTIZED_ROWS = 256


@dataclass(frozen=True, slots=True)
class Job:
    """One way to do one conversion.

    Attributes
    ----------
    task, program : str
    arguments : list of str
        Of Python; OUT stands for the output.
    """

    task: str
    program: str
    arguments: list[str]


def prepare(directory: Path, layers: int) -> dict[str, Path]:
    """Make the inputs that are not there yet, and return them by name."""
    shape = replace(LLAMA_1B, name=f"llama-1b-{layers}", layers=layers)
    model = write_model(shape, directory / shape.name)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(SMALL_MODEL / name, model / name)
    made = {name: directory / f"{shape.name}-{name}" for name in ("bundle", "f16", "q8_0", "q4_k")}
    made |= {name: made[name].with_suffix(".gguf") for name in ("f16", "q8_0", "q4_k")}
    if not made["bundle"].exists():
        convert(model, made["bundle"])
    for name in ("f16", "q8_0"):
        if not made[name].exists():
            convert(made["bundle"], made[name], dtype=name)
    if not made["q4_k"].exists():
        with open_gguf(made["f16"]) as file:
            _write_q4_k(file, made["q4_k"])
    return made


def _write_q4_k(file: GGUFFile, target: Path) -> None:
    """Quantize the matrices of a file with ggml itself: their first rows, again and again.

    Reading takes no longer for other numbers, and ggml would take minutes for all of them.
    """

    def planned(name: str) -> PlannedTensor:
        tensor = file.tensors[name]
        if len(tensor.shape) < 2:
            return PlannedTensor(name, tensor.shape, tensor.type, lambda: [file.load(name)])

        def chunks() -> Iterator[bytes]:
            rows, length = tensor.shape
            some = file.load(name)[: _QUANTIZED_ROWS * tensor.type.row_bytes(length)]
            values = dequantize(some, tensor.type, (_QUANTIZED_ROWS, length))
            made = quantize(values, GGMLType.Q4_K)
            for start in range(0, rows, _QUANTIZED_ROWS):
                yield made[: (min(rows - start, _QUANTIZED_ROWS)) * GGMLType.Q4_K.row_bytes(length)]

        return PlannedTensor(name, tensor.shape, GGMLType.Q4_K, chunks)

    with open_publication("file", target, plan="q4_k") as output:
        write_gguf(output, file.metadata, [planned(name) for name in file.tensors])
        output.commit()


def jobs(made: dict[str, Path], peers: bool) -> Iterator[Job]:
    """Yield all jobs, those of one task one after the other."""
    bundle = made["bundle"]
    ours = ["-m", "loraformat", "convert", "--quiet"]
    for kind in ("f16", "q8_0"):
        task = f"NF4 bundle to {kind.upper()}"
        yield Job(task, "loraformat", [*ours, f"{bundle}", "OUT.gguf", "--dtype", kind])
        yield Job(task, "plain copy", ["-c", COPY, f"{bundle}", f"{made[kind]}", "OUT"])
        if peers:
            arguments = ["-c", FROM_NF4, f"{bundle}", "OUT.gguf", kind.upper()]
            yield Job(task, "bitsandbytes + gguf-py, no tokenizer", arguments)
    for kind in ("q4_k", "q8_0"):
        task, source = f"{kind.upper()} to NF4 bundle", f"{made[kind]}"
        yield Job(task, "loraformat", [*ours, source, "OUT"])
        yield Job(task, "plain copy", ["-c", COPY, source, f"{bundle}", "OUT"])
        if peers:
            yield Job(task, "gguf-py, dequantizing only", ["-c", DEQUANTIZE, source])
    task, source = "Q4_K to dense BF16", f"{made['q4_k']}"
    yield Job(task, "loraformat", [*ours, source, "OUT", "--to", "safetensors"])
    if peers:
        yield Job(task, "transformers", ["-c", TRANSFORMERS, source, "OUT"])


def measure(wanted: list[Job], place: Path, runs: int) -> dict[tuple[str, str], Cost]:
    """Run every job, and return the costs by task and program."""
    costs: dict[tuple[str, str], list[Cost]] = {}
    for _ in range(runs + 1):
        for job in wanted:
            with tempfile.TemporaryDirectory(dir=place) as scratch:
                output = os.fspath(Path(scratch) / "out")
                arguments = [output + word.removeprefix("OUT") if word.startswith("OUT") else word
                             for word in job.arguments]  # fmt: skip
                costs.setdefault((job.task, job.program), []).append(run_python(arguments))
    return {key: median_cost(measured[1:]) for key, measured in costs.items()}


@click.command()
@click.option("--directory", type=click.Path(path_type=Path), help="Where to keep the inputs.")
@click.option("--layers", default=LLAMA_1B.layers, show_default=True)
@click.option("--runs", default=2, show_default=True)
@click.option("--peers/--no-peers", default=True, help="Also run other programs.")
@click.option("--only", default="", metavar="TEXT", help="Tasks with this in their names.")
@click.option("--json", "json_path", type=click.Path(path_type=Path))
def main(
    directory: Path | None, layers: int, runs: int, peers: bool, only: str, json_path: Path | None
) -> None:
    """Measure, print a table, write JSON."""
    with tempfile.TemporaryDirectory() as scratch:
        place = directory or Path(scratch)
        place.mkdir(parents=True, exist_ok=True)
        wanted = [job for job in jobs(prepare(place, layers), peers) if only in job.task]
        results = measure(wanted, place, runs)
    about = machine()
    click.echo(", ".join(f"{key}: {value}" for key, value in about.items()))
    previous = ""
    for (task, program), cost in results.items():
        if task != previous:
            click.echo(f"\n{task:44}{'wall s':>8}{'CPU s':>8}{'anon MB':>9}{'CPU / ours':>12}")
        ours, previous = results[task, "loraformat"], task
        click.echo(
            f"{program:44}{cost.wall:8.2f}{cost.cpu:8.2f}{cost.anonymous / 1e6:9.0f}"
            f"{cost.cpu / ours.cpu:12.2f}"
        )
    if json_path:
        rows = [{"task": task, "program": program, **cost.to_json()}
                for (task, program), cost in results.items()]  # fmt: skip
        json_path.write_text(json.dumps({"machine": about, "results": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
