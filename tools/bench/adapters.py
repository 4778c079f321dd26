"""Measure rank reduction and extraction beside what other tools do, in one interleaved run.

Every row runs its methods one after the other, repeats that, and takes medians: the machine's
mood hits all alike, so trust the ratios. Seconds are CPU seconds of all threads, so that a busy
machine does not count. A full SVD takes minutes and runs once.

Example
-------
    python tools/bench/adapters.py --repeat 5 --json adapters.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from threadpoolctl import threadpool_limits

sys.path.insert(0, str(Path(__file__).parent))  # run as a file, too

from process import machine

from loraformat.algebra import lora
from loraformat.algebra.subspace import block_krylov
from loraformat.tensors.arrays import Array

Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass
class Row:
    """One method on one task.

    Attributes
    ----------
    task, method : str
    seconds : float
        Median of the CPU seconds.
    ratio : float
        Seconds over those of loraformat.
    captured : float
        Share of the squared norm.
    of_optimum : float
        That, over the share that the best approximation has.
    """

    task: str
    method: str
    seconds: float
    ratio: float
    captured: float
    of_optimum: float


def captured(d: torch.Tensor, found: Pair) -> float:
    """Return the share of ‖D‖² that factors hold."""
    lost = float((d - found[0].float() @ found[1].float()).double().square().sum())
    return 1 - lost / float(d.double().square().sum())


def full_svd(d: torch.Tensor, rank: int) -> Pair:
    """Decompose the whole matrix, as PEFT and mergekit do."""
    u, s, v = torch.linalg.svd(d, full_matrices=False)
    return u[:, :rank] * s[:rank], v[:rank]


def lowrank_svd(d: torch.Tensor, rank: int, q: int) -> Pair:
    """Use torch's randomized SVD, as kohya's sd-scripts do with q = 2 · rank."""
    u, s, v = torch.svd_lowrank(d, q=q, niter=2)
    return u[:, :rank] * s[:rank], v[:, :rank].T


def measure(
    task: str,
    d: torch.Tensor,
    optimum: float,
    methods: dict[str, Callable[[], Pair]],
    slow: dict[str, Callable[[], Pair]],
    repeat: int,
) -> list[Row]:
    """Time methods in turn; the first is loraformat."""
    times: dict[str, list[float]] = {name: [] for name in [*methods, *slow]}
    results: dict[str, Pair] = {}
    for turn in range(repeat + 1):
        now = methods | slow if turn == repeat else methods
        for name, work in now.items():
            began = time.process_time()
            results[name] = work()
            if turn or name in slow:  # the first turn warms up
                times[name].append(time.process_time() - began)
    ours = statistics.median(times[next(iter(methods))])
    rows = []
    for name, taken in times.items():
        seconds, share = statistics.median(taken), captured(d, results[name])
        rows.append(Row(task, name, seconds, seconds / ours, share, share / optimum))
    return rows


def tensors(found: tuple[Array, Array]) -> Pair:
    """Return factors as torch tensors."""
    return torch.from_numpy(found[0]), torch.from_numpy(found[1])


def share(values: torch.Tensor, rank: int) -> float:
    """Return the share of the squared norm in the first `rank` values."""
    squares = values.double().square()
    return float(squares[:rank].sum() / squares.sum())


def reduction(m: int, n: int, repeat: int, slow: bool) -> list[Row]:
    """Reduce rank 64 to 16; others form the delta first, and its time counts."""
    b, a = torch.randn(m, 64), torch.randn(64, n)
    d, stored_b, stored_a = b @ a, b.numpy(), a.numpy()

    def ours() -> Pair:
        return tensors(lora.truncate(lora.core(stored_b, stored_a), 16))

    methods: dict[str, Callable[[], Pair]] = {
        "loraformat": ours,
        "svd_lowrank q=32": lambda: lowrank_svd(b @ a, 16, 32),
    }
    full: dict[str, Callable[[], Pair]] = {"full SVD": lambda: full_svd(b @ a, 16)}
    optimum = share(torch.from_numpy(lora.singular_values(stored_b, stored_a)), 16)
    task = f"reduce 64 to 16, {m}x{n}"
    return measure(task, d, optimum, methods, full if slow else {}, repeat)


def extraction(n: int, repeat: int, slow: bool) -> list[Row]:
    """Extract rank 64 from a difference whose singular values decay as i^-0.6."""
    values = torch.arange(1, n + 1).float() ** -0.6
    u, v = (torch.linalg.qr(torch.randn(n, n)).Q for _ in range(2))
    d = (u * values) @ v.T
    stored, tile = d.numpy(), 1024

    def ours() -> Pair:
        def tiles() -> Iterator[tuple[int, Array]]:
            return ((i, stored[i : i + tile]) for i in range(0, n, tile))

        return tensors(block_krylov(tiles, (n, n), 64).factors(64))

    methods: dict[str, Callable[[], Pair]] = {
        "loraformat": ours,
        "svd_lowrank q=64": lambda: lowrank_svd(d, 64, 64),
        "svd_lowrank q=128": lambda: lowrank_svd(d, 64, 128),
    }
    full: dict[str, Callable[[], Pair]] = {"full SVD": lambda: full_svd(d, 64)}
    task = f"extract rank 64, {n}x{n}"
    return measure(task, d, share(values, 64), methods, full if slow else {}, repeat)


def main() -> None:
    """Run the benchmark and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-full-svd", action="store_true", help="leave out what takes minutes")
    parser.add_argument("--only", choices=["reduce", "extract"])
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    threadpool_limits(options.threads, user_api="blas")  # numpy's
    torch.manual_seed(0)
    slow, rows = not options.no_full_svd, []
    if options.only != "extract":
        rows += reduction(4096, 14336, options.repeat, slow)
    if options.only != "reduce":
        rows += extraction(4096, options.repeat, slow)
    print(f"{'task':28} {'method':18} {'CPU s':>9} {'ratio':>8} {'captured':>10} {'of best':>10}")
    for row in rows:
        print(
            f"{row.task:28} {row.method:18} {row.seconds:9.4f} {row.ratio:8.1f} "
            f"{row.captured:10.6f} {row.of_optimum:10.6f}"
        )
    if options.json:
        report = {
            "machine": {**machine(), "threads": torch.get_num_threads()},
            "rows": [asdict(row) for row in rows],
        }
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
