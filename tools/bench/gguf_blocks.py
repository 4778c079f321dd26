"""Measure reading and making the types of GGUF tensors, beside gguf-py and a plain copy.

Every row times loraformat, gguf-py on the whole tensor and a copy of the float32 numbers one
after the other, repeats that, and takes medians: trust the ratios.

Example
-------
    python tools/bench/gguf_blocks.py --repeat 5 --json gguf.json
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import click
import numpy

sys.path.insert(0, os.fspath(Path(__file__).parent))

from loraformat_converters.gguf.container.types import GGMLType
from loraformat_converters.gguf.quantization.blocks import (
    DEQUANTIZABLE,
    QUANTIZABLE,
    dequantize,
    quantize,
    quantized_tiles,
)
from nf4 import Work, measure
from process import machine

from loraformat.tensors.arrays import Array

SHAPE = (2048, 5632)  # a projection of a 1B-class llama


def contenders(numbers: Array, kind: GGMLType) -> Iterator[tuple[str, dict[str, Work]]]:
    """Yield operations on one type, and their contenders.

    Parameters
    ----------
    numbers : numpy.ndarray
        float32, two dimensions.
    kind : GGMLType
        One that cannot be made is read from random bytes.
    """
    from gguf import GGMLQuantizationType, quants

    foreign = GGMLQuantizationType(int(kind))
    out = numpy.empty_like(numbers)
    row_bytes = kind.row_bytes(numbers.shape[1])
    if kind in QUANTIZABLE:
        raw = quantize(numbers, kind)
        yield (
            "make",
            {
                "loraformat": lambda: list(quantized_tiles(numbers, kind)),
                "gguf": lambda: quants.quantize(numbers, foreign),
                "copy": lambda: numpy.copyto(out, numbers),
            },
        )
    else:
        raw = numpy.random.default_rng(0).bytes(numbers.shape[0] * row_bytes)
    stored = numpy.frombuffer(raw, dtype=numpy.uint8).reshape(-1, row_bytes)
    yield (
        "read",
        {
            "loraformat": lambda: dequantize(memoryview(raw), kind, SHAPE),
            "gguf": lambda: quants.dequantize(stored, foreign),
            "copy": lambda: numpy.copyto(out, numbers),
        },
    )


@click.command()
@click.option("--repeat", default=3, show_default=True, help="Rounds per row.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the numbers too.")
def main(repeat: int, json_path: Path | None) -> None:
    """Measure everything, print a table, write JSON if asked."""
    facts: dict[str, object] = {**machine(), "gguf": version("gguf"), "shape": list(SHAPE)}
    click.echo("\n".join(f"{key}: {value}" for key, value in facts.items()))
    numbers = numpy.random.default_rng(0).standard_normal(SHAPE, numpy.float32)
    megabytes = numbers.nbytes / 1e6
    rows = []
    numpy.seterr(all="ignore")  # random bytes are strange scales
    for kind in sorted(DEQUANTIZABLE):
        if kind is GGMLType.F32 or (kind.block == 1 and kind not in QUANTIZABLE):
            continue
        for operation, works in contenders(numbers, kind):
            milliseconds = measure(works, repeat)
            rows.append({"operation": operation, "type": kind.name, "milliseconds": milliseconds})
            speeds = "   ".join(
                f"{name} {megabytes / ms:6.2f} GB/s" for name, ms in milliseconds.items()
            )
            click.echo(f"{operation} {kind.name:8} | {speeds}   (of float32)")
    if json_path:
        json_path.write_text(json.dumps({"machine": facts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
