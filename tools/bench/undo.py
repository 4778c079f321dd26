"""Measure the interval code of undo records, in nanoseconds per weight on one core.

One matrix, a delta of rank 16 and 1 % of its norm, tiles as in a merge. Beside the code: what
surrounds it in a merge and an unmerge (the fixed-point delta, the rounded sum, SHA-256), and two
other ways to get the original back: a copy of it, and zlib on the differences of places between
the original and round(M − d). All rows are timed in turn, in CPU time, which a
shared machine disturbs less than wall time.

Example
-------
    python tools/bench/undo.py --rows 1024 --repeat 5
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
import zlib
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import click
import numpy

sys.path.insert(0, os.fspath(Path(__file__).parent))

from process import machine

from loraformat.algebra.blas import one_blas_thread
from loraformat.algebra.row_tiles import row_tiles
from loraformat.nf4.kernels import VARIABLE, available
from loraformat.nf4.kernels.merge_tile import merged_values
from loraformat.ops.merge.deltas import TILE_ELEMENTS
from loraformat.tensors.arrays import array_bytes, numpy_dtype
from loraformat.tensors.dtypes import WEIGHT_DTYPES
from loraformat.undo.fixed_point import product
from loraformat.undo.interval_code import decode_tile, encode_tile

_RANK, _RELATIVE = 16, 0.01
_TYPES = {word: numpy_dtype(name) for word, name in WEIGHT_DTYPES.items()}
Work = Callable[[], object]


class Matrix:
    """One weight, its delta and what they merge into.

    Parameters
    ----------
    rows, columns : int
    source, target : numpy.dtype
    """

    def __init__(
        self, rows: int, columns: int, source: numpy.dtype[Any], target: numpy.dtype[Any]
    ) -> None:
        random = numpy.random.default_rng(0)
        self.weight = random.normal(0, 0.02, (rows, columns)).astype(numpy.float32).astype(source)
        left = random.normal(size=(rows, _RANK))
        right = random.normal(size=(_RANK, columns))
        self.product = product(left * (0.02 * _RELATIVE / _RANK**0.5), right, exact=True)
        self.tiles = list(row_tiles(rows, columns, TILE_ELEMENTS))
        self.delta = self.product.rows(0, rows)
        self.merged = merged_values(self.weight, self.delta, None, target)
        self.out = numpy.empty_like(self.weight)
        self.codes: list[bytes] = []

    def each(self, work: Callable[[int, int], object]) -> Work:
        """Return work on every tile."""
        return lambda: [work(start, stop) for start, stop in self.tiles]

    def encode(self) -> None:
        """Encode every tile."""
        self.codes = [
            encode_tile(self.weight[a:b], self.delta[a:b], None, self.merged[a:b])[0]
            for a, b in self.tiles
        ]

    def decode(self) -> None:
        """Decode every tile."""
        for (a, b), code in zip(self.tiles, self.codes, strict=True):
            merged, out = self.merged[a:b], self.out[a:b]
            decode_tile(merged, self.delta[a:b], None, out.dtype, code, out)

    def differences(self) -> bytes:
        """Compress what a naive subtraction gets wrong."""
        near = (self.merged.astype(numpy.float32) - self.delta).astype(self.weight.dtype)
        kind = f"i{near.itemsize}"
        return zlib.compress((self.weight.view(kind) - near.view(kind)).tobytes(), 6)

    def works(self) -> dict[str, Work]:
        """Return what to time, by name."""
        raw = array_bytes(self.weight)
        works: dict[str, Work] = {
            "fixed-point delta": self.each(lambda a, b: self.product.rows(a, b)),
            "sum and rounding": self.each(
                lambda a, b: merged_values(
                    self.weight[a:b], self.delta[a:b], None, self.merged.dtype
                )
            ),
            "SHA-256 of the weight": lambda: sha256(raw),
            "copy of the weight": lambda: numpy.copyto(self.out, self.weight),
            "zlib of differences": self.differences,
        }
        for kernel in available():
            works[f"encode, {kernel}"] = forced(kernel, self.encode)
            works[f"decode, {kernel}"] = forced(kernel, self.decode)
        return works

    def bits(self) -> dict[str, float]:
        """Return what each way to the original stores per weight."""
        count = self.weight.size
        return {
            "interval code": 8 * sum(map(len, self.codes)) / count,
            "zlib of differences": 8 * len(self.differences()) / count,
            "copy": 8.0 * self.weight.itemsize,
        }


def forced(kernel: str, work: Work) -> Work:
    """Return work with one kernel."""

    def run() -> object:
        os.environ[VARIABLE] = kernel
        try:
            return work()
        finally:
            del os.environ[VARIABLE]

    return run


def measure(works: dict[str, Work], count: int, repeat: int) -> dict[str, float]:
    """Return the median nanoseconds per weight of each, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for run in range(repeat + 1):
        for name, work in works.items():
            began = time.process_time()
            work()
            if run:
                seconds[name].append(time.process_time() - began)
    return {name: statistics.median(found) * 1e9 / count for name, found in seconds.items()}


@click.command()
@click.option("--rows", default=2048, show_default=True)
@click.option("--columns", default=4096, show_default=True)
@click.option("--repeat", default=5, show_default=True)
@click.option("--source", type=click.Choice(list(_TYPES)), default="bf16", show_default=True)
@click.option("--target", type=click.Choice(list(_TYPES)), default="bf16", show_default=True)
@click.option("--json", "json_path", type=click.Path(path_type=Path))
def main(
    rows: int, columns: int, repeat: int, source: str, target: str, json_path: Path | None
) -> None:
    """Measure, print a table, write JSON."""
    matrix = Matrix(rows, columns, _TYPES[source], _TYPES[target])
    with one_blas_thread():
        found, about = measure(matrix.works(), rows * columns, repeat), machine()
    if not numpy.array_equal(matrix.out, matrix.weight):
        raise click.ClickException("the original did not come back")
    click.echo(", ".join(f"{key}: {value}" for key, value in about.items()))
    click.echo(f"{rows} x {columns}, {source} merged into {target}; ns per weight, one core")
    for name, nanoseconds in found.items():
        click.echo(f"{name:28}{nanoseconds:9.2f}")
    bits = matrix.bits()
    for name, stored in bits.items():
        click.echo(f"{name:28}{stored:9.4f} bits per weight")
    if json_path:
        members = {"machine": about, "ns_per_weight": found, "bits_per_weight": bits}
        json_path.write_text(json.dumps(members, indent=2) + "\n")


if __name__ == "__main__":
    main()
