"""Measure the NF4 codec beside bitsandbytes, in one interleaved run.

Every row times loraformat's fastest kernel, its torch fallback and bitsandbytes one after the
other, repeats that, and takes medians: the machine's mood hits all alike, so trust the ratios.

Example
-------
    python tools/bench/nf4.py --repeat 7 --json nf4.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch

from loraformat import kernels, nf4
from loraformat.kernels.threads import default_threads

SHAPES = ((4096, 4096), (4096, 14336))
DTYPES = (torch.bfloat16, torch.float32)
Work = Callable[[], object]


def machine() -> dict[str, str]:
    """Describe what the numbers depend on.

    Returns
    -------
    dict
        CPU model, kernels, versions.
    """
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        named = (line for line in info.read_text().splitlines() if line.startswith("model name"))
        model = next(named, f": {model}").split(":", 1)[1].strip()
    return {
        "cpu": model,
        "cpus": str(default_threads()),
        "kernels": ", ".join(kernels.available()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "bitsandbytes": version("bitsandbytes"),
    }


def forced(choice: str, work: Work) -> Work:
    """Run `work` with another kernel.

    Parameters
    ----------
    choice : str
        One of `loraformat.kernels.CHOICES`.
    work : callable
        Without arguments.

    Returns
    -------
    callable
        Without arguments.
    """

    def run() -> object:
        os.environ[kernels.VARIABLE] = choice
        try:
            return work()
        finally:
            del os.environ[kernels.VARIABLE]

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

    q = nf4.quantize(x)
    packed, state = bnb.quantize_4bit(x, compress_statistics=True, quant_type="nf4")
    out = torch.empty_like(x)
    scales, rows = q.scales(), torch.empty(256, x.shape[1])

    def tiles() -> None:
        for start in range(0, x.numel(), rows.numel()):
            stop = start + rows.numel()
            nf4.dequantize(q, out=rows, start=start, stop=stop, scales=scales, threads=threads)

    ours: dict[str, Work] = {
        "quantize": lambda: nf4.quantize(x, threads=threads),
        "dequantize": lambda: nf4.dequantize(q, out=out, threads=threads),
        "dequantize, fresh output": lambda: nf4.dequantize(q, dtype=x.dtype, threads=threads),
        "float32 tiles of 256 rows": tiles,
        "quantization error": lambda: nf4.quantization_error(x, q, threads=threads),
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


def main() -> int:
    """Measure everything, print a table, write JSON if asked.

    Returns
    -------
    int
        0.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--repeat", type=int, default=5, help="rounds per row (default 5)")
    parser.add_argument("--kernels", default="auto,torch", help="ours to compare (auto,torch)")
    parser.add_argument("--threads", default="1,2", help="thread counts (1,2)")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    options = parser.parse_args()
    choices = options.kernels.split(",")
    facts, rows = machine(), []
    print("\n".join(f"{key}: {value}" for key, value in facts.items()))
    torch.manual_seed(0)
    for threads in map(int, options.threads.split(",")):
        torch.set_num_threads(threads)
        for shape in SHAPES:
            for dtype in DTYPES:
                x = torch.randn(shape).to(dtype)
                for operation, works in contenders(x, threads, choices).items():
                    row = {
                        "threads": threads,
                        "shape": list(shape),
                        "dtype": str(dtype).removeprefix("torch."),
                        "operation": operation,
                        "milliseconds": measure(works, options.repeat),
                    }
                    rows.append(row)
                    print(table_row(row), flush=True)
    if options.json:
        options.json.write_text(json.dumps({"machine": facts, "rows": rows}, indent=1) + "\n")
    return 0


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
    sys.exit(main())
