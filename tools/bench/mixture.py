"""Measures a training step of a mixture of experts against what it cannot do without.

The shape is that of Qwen3-30B-A3B, with random weights: 17 GB on the disk. A step (forward,
backward, clipping, AdamW; every layer computed again in the backward pass) runs in a process of its
own, `train_step.py` beside this, the page cache emptied of each layer once it was used. Then the
same products are computed alone, with weights that are decoded already, and as many weights are
decoded alone, into memory that is used again. It is the second step that is compared: in the first
one gradients are tried out. Both are those of the experts that the step's tokens
went to, of attention and of the head: forward, forward again and backward.

Others may use the machine: seconds of the processor, of all threads, are compared as well.

Example: python tools/bench/mixture.py --tokens 512 --target attention --directory bundles
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in loraformat's commands

import click
import numpy
import torch

sys.path.insert(0, os.fspath(Path(__file__).parent))

from bundles import write_bundle
from shapes import QWEN3_30B_A3B, MixtureShape

from loraformat.nf4 import codec
from loraformat.tensors.arrays import numpy_dtype

#: Weights that are multiplied in turn, so that they are not in the cache.
_TURNS = 8
_PASSES = 3


@click.command()
@click.option("--directory", type=click.Path(path_type=Path), required=True, help="Of the bundle.")
@click.option("--layers", default=QWEN3_30B_A3B.layers, show_default=True)
@click.option("--tokens", default=512, show_default=True)
@click.option("--rank", default=8, show_default=True)
@click.option("--target", "targets", multiple=True, help="What is adapted. Repeatable.")
@click.option("--limit", type=int, help="MiB of anonymous memory, as a hard limit.")
@click.option("--threads", default=2, show_default=True)
def main(
    directory: Path, layers: int, tokens: int, rank: int, targets: tuple[str, ...],
    limit: int | None, threads: int,
) -> None:  # fmt: skip
    """Measure, and print one line of JSON."""
    shape = replace(QWEN3_30B_A3B, layers=layers)
    bundle = write_bundle(shape, directory / f"{shape.name}-{layers}")
    step = _step(bundle, tokens, rank, targets, limit, threads)
    torch.set_num_threads(threads)
    routed: dict[str, list[int]] = step.pop("routed")
    alone = {"products": _products(shape, routed, tokens), "decoding": _decoding(shape, routed)}
    figures = {**step, "experts_routed": sum(map(len, routed.values())) / len(routed)}
    for index, clock in enumerate(("seconds", "cpu_seconds")):
        whole = sum(times[index] for times in alone.values())
        figures |= {f"{what}_{clock}": times[index] for what, times in alone.items()}
        figures[f"ratio_{clock}"] = step[f"step_{clock}"][-1] / whole
    figures["read_ratio"] = step["layer_bytes"] / (2 * step["layer_bytes_wanted"])
    figures["load_average"] = os.getloadavg()[0]
    click.echo(json.dumps(figures))


def _step(
    bundle: Path, tokens: int, rank: int, targets: tuple[str, ...], limit: int | None, threads: int
) -> dict[str, Any]:
    program = os.fspath(Path(__file__).with_name("train_step.py"))
    command = [
        sys.executable, program, "ours", os.fspath(bundle), "--compute", "bfloat16", "--cold",
        "--recompute", "--routing", "--steps", "2", "--tokens", str(tokens), "--rank", str(rank),
        "--threads", str(threads), *(word for name in targets for word in ("--target", name)),
        *(["--limit", str(limit)] if limit else []),
    ]  # fmt: skip
    child = subprocess.run(command, capture_output=True, text=True)
    if child.returncode:
        raise click.ClickException(child.stderr[-2000:])
    facts: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    return facts


def _timed(work: Callable[[], object]) -> tuple[float, float]:
    work()
    began = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - began[0], time.process_time() - began[1]


def _attention(shape: MixtureShape) -> list[tuple[int, int]]:
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    return [
        (queries, shape.hidden), (keys, shape.hidden), (keys, shape.hidden), (shape.hidden, queries)
    ]  # fmt: skip


def _experts(shape: MixtureShape) -> list[tuple[int, int]]:
    return [(2 * shape.expert, shape.hidden), (shape.hidden, shape.expert)]


def _products(
    shape: MixtureShape, routed: dict[str, list[int]], tokens: int
) -> tuple[float, float]:
    """Return the seconds and processor seconds of all products with the base."""

    def multiply(sizes: tuple[int, int], counts: list[int]) -> Callable[[], None]:
        weights = [torch.randn(sizes, dtype=torch.bfloat16) for _ in range(_TURNS)]
        x = torch.randn(max(counts), sizes[1], dtype=torch.bfloat16)
        y = torch.randn(max(counts), sizes[0], dtype=torch.bfloat16)

        def work() -> None:
            for turn, count in enumerate(counts):
                w = weights[turn % _TURNS]
                for _ in range(_PASSES - 1):
                    x[:count] @ w.T
                y[:count] @ w

        return work

    jobs = [
        multiply(sizes, [tokens] * shape.layers) for sizes in _attention(shape)
    ]  # fmt: skip
    experts = [count for counts in routed.values() for count in counts]
    jobs += [multiply(sizes, experts) for sizes in _experts(shape)]
    times = [_timed(job) for job in jobs]
    times.append(_timed_head(shape, tokens))
    return sum(t[0] for t in times), sum(t[1] for t in times)


def _timed_head(shape: MixtureShape, tokens: int) -> tuple[float, float]:
    """Return what the head's two products take: it is in bfloat16, and not computed again."""
    weight = torch.randn(shape.vocabulary, shape.hidden, dtype=torch.bfloat16)
    x = torch.randn(tokens, shape.hidden, dtype=torch.bfloat16)
    y = torch.randn(tokens, 4096, dtype=torch.bfloat16)

    def work() -> None:
        for start in range(0, shape.vocabulary, 4096):
            rows = weight[start : start + 4096]
            x @ rows.T
            y[:, : len(rows)] @ rows

    return _timed(work)


def _decoding(shape: MixtureShape, routed: dict[str, list[int]]) -> tuple[float, float]:
    """Return the seconds and processor seconds of decoding what is multiplied, each time."""
    experts = sum(map(len, routed.values()))
    times = []
    for sizes, count in [
        *((sizes, shape.layers) for sizes in _attention(shape)),
        *((sizes, experts) for sizes in _experts(shape)),
    ]:
        codes = [
            codec.quantize(numpy.random.default_rng(0).normal(size=sizes).astype(numpy.float32))
            for _ in range(_TURNS)
        ]
        out = numpy.empty(sizes, numpy_dtype("BF16"))

        def work(codes: list[Any] = codes, out: Any = out, count: int = count) -> None:
            for turn in range(_PASSES * count):
                codec.dequantize(codes[turn % _TURNS], out=out)

        times.append(_timed(work))
    return sum(t[0] for t in times), sum(t[1] for t in times)


if __name__ == "__main__":
    main()
