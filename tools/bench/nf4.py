"""Measure the NF4 codec beside bitsandbytes, in one interleaved run.

Every row times loraformat's fastest kernel, its numpy fallback and bitsandbytes one after the
other, repeats that, and takes medians: the machine's mood hits all alike, so trust the ratios.

Example
-------
    python tools/bench/nf4.py --repeat 7 --json nf4.json
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import click
import numpy
import torch

sys.path.insert(0, os.fspath(Path(__file__).parent))

from process import machine

from loraformat.nf4 import codec
from loraformat.nf4.kernels import VARIABLE, available
from loraformat.tensors.torch_arrays import array_of

SHAPES = ((4096, 4096), (4096, 14336))
DTYPES = (torch.bfloat16, torch.float32)
Work = Callable[[], object]


def forced(choice: str, work: Work) -> Work:
    """Run `work` with another kernel.

    Parameters
    ----------
    choice : str
        One of `loraformat.nf4.kernels.CHOICES`.
    work : callable
        Without arguments.

    Returns
    -------
    callable
        Without arguments.
    """

    def run() -> object:
        os.environ[VARIABLE] = choice
        try:
            return work()
        finally:
            del os.environ[VARIABLE]

    return run


def contenders(x: torch.Tensor, threads: int, choices: list[str]) -> dict[str, dict[str, Work]]:
    """Make the work to time on one tensor.

    Parameters
    ----------
    x : Tensor
        The tensor.
    threads : int
        For each contender.
    choices : list of str
        Kernels of ours.

    Returns
    -------
    dict
        Operation -> contender -> work.
    """
    import bitsandbytes.functional as bnb

    array = array_of(x)
    q = codec.quantize(array)
    packed, state = bnb.quantize_4bit(x, compress_statistics=True, quant_type="nf4")
    out = numpy.empty_like(array)
    scales, rows = q.scales(), numpy.empty((256, x.shape[1]), numpy.float32)

    def tiles() -> None:
        for start in range(0, array.size, rows.size):
            stop = start + rows.size
            codec.dequantize(q, out=rows, start=start, stop=stop, scales=scales, threads=threads)

    ours: dict[str, Work] = {
        "quantize": lambda: codec.quantize(array, threads=threads),
        "dequantize": lambda: codec.dequantize(q, out=out, threads=threads),
        "dequantize, fresh output": lambda: codec.dequantize(q, dtype=array.dtype, threads=threads),
        "float32 tiles of 256 rows": tiles,
        "quantization error": lambda: codec.quantization_error(array, q, threads=threads),
    }
    decode: Work = lambda: bnb.dequantize_4bit(packed, state)  # noqa: E731
    theirs: dict[str, Work] = {
        "quantize": lambda: bnb.quantize_4bit(x, compress_statistics=True, quant_type="nf4"),
        "dequantize": decode,
        "dequantize, fresh output": decode,
    }
    return {
        operation: {choice: forced(choice, work) for choice in choices}
        | ({"bitsandbytes": theirs[operation]} if operation in theirs else {})
        for operation, work in ours.items()
    }


def measure(works: dict[str, Work], repeat: int) -> dict[str, float]:
    """Time the contenders in turn.

    Parameters
    ----------
    works : dict
        Contender -> work.
    repeat : int
        Rounds, after one that does not count.

    Returns
    -------
    dict
        Contender -> median milliseconds.
    """
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeat + 1):
        for name, work in works.items():
            begin = time.perf_counter()
            work()
            times[name].append((time.perf_counter() - begin) * 1e3)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


@click.command()
@click.option("--repeat", default=5, show_default=True, help="Rounds per row.")
@click.option("--kernels", default="auto,numpy", show_default=True, help="Ours to compare.")
@click.option("--threads", "thread_counts", default="1,2", show_default=True)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the numbers too.")
def main(repeat: int, kernels: str, thread_counts: str, json_path: Path | None) -> None:
    """Measure everything, print a table, write JSON if asked."""
    facts: dict[str, object] = {
        **machine(),
        "kernels": ", ".join(available()),
        "bitsandbytes": version("bitsandbytes"),
    }
    rows = []
    click.echo("\n".join(f"{key}: {value}" for key, value in facts.items()))
    torch.manual_seed(0)
    for threads in map(int, thread_counts.split(",")):
        torch.set_num_threads(threads)
        for shape in SHAPES:
            for dtype in DTYPES:
                x = torch.randn(shape).to(dtype)
                for operation, works in contenders(x, threads, kernels.split(",")).items():
                    row = {
                        "threads": threads,
                        "shape": list(shape),
                        "dtype": str(dtype).removeprefix("torch."),
                        "operation": operation,
                        "milliseconds": measure(works, repeat),
                    }
                    rows.append(row)
                    click.echo(table_row(row))
    if json_path:
        json_path.write_text(json.dumps({"machine": facts, "rows": rows}, indent=1) + "\n")


def table_row(row: dict[str, object]) -> str:
    """Format one measurement.

    Parameters
    ----------
    row : dict
        As in the JSON file.

    Returns
    -------
    str
        One line; ratios are speed relative to bitsandbytes, if it has the operation.
    """
    times, shape = row["milliseconds"], row["shape"]
    assert isinstance(times, dict) and isinstance(shape, list)
    peer = times.get("bitsandbytes")
    cells = [
        f"{name} {ms:8.2f} ms" + (f" ({peer / ms:6.2f}x)" if peer else "")
        for name, ms in times.items()
    ]
    size = f"{shape[0]}x{shape[1]}"
    head = f"{row['threads']} thr {size:10} {row['dtype']:8} {row['operation']:25}"
    return f"{head} | " + " | ".join(cells)


if __name__ == "__main__":
    main()
