"""Times training steps: against PEFT on the same bundle, and on shapes that PEFT cannot hold here.

Each row is a process of its own that runs `train_step.py` beside this: forward, backward, clipping
and AdamW on one row of random tokens. The 1B shape is run by loraformat, by PEFT on bitsandbytes
NF4 and by PEFT on dense bfloat16 weights, which compute each layer again in the backward pass, and
by loraformat so, too; larger shapes by loraformat alone, each layer computed again, with a hard
limit on anonymous memory, each layer dropped from the page cache once it was used.

Example: python tools/bench/train.py 1b --steps 3 --directory bundles
         python tools/bench/train.py 70b --steps 1 --tokens 128 --limit 3584
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import click

sys.path.insert(0, os.fspath(Path(__file__).parent))

from bundles import write_bundle
from process import machine
from shapes import LLAMA_1B, LLAMA_8B, LLAMA_70B

_SHAPES = {"1b": LLAMA_1B, "8b": LLAMA_8B, "70b": LLAMA_70B}
_OURS = (
    ("ours", "float32"),
    ("ours-recompute", "float32"),
    ("ours", "bfloat16"),
    ("ours-recompute", "bfloat16"),
)
_PEERS = ("peft-nf4", "float32"), ("peft-nf4", "bfloat16"), ("peft-dense", "bfloat16")
_NAMES = {
    "ours": "loraformat",
    "ours-recompute": "loraformat, all again",
    "peft-nf4": "PEFT + bitsandbytes",
    "peft-dense": "PEFT, dense bf16",
}

_COLUMNS = ("step s", "CPU s", "anon MB", "RSS MB", "stall s", "decode s", "loss", "/ ours")


@click.command()
@click.argument("shape_name", metavar="SHAPE", type=click.Choice(list(_SHAPES)))
@click.option("--directory", type=click.Path(path_type=Path), help="Where to keep the bundles.")
@click.option("--tokens", default=512, show_default=True)
@click.option("--rank", default=8, show_default=True)
@click.option("--steps", default=3, show_default=True, help="The first is not counted, if others.")
@click.option("--threads", default=2, show_default=True)
@click.option("--limit", type=int, help="MiB of anonymous memory for the larger shapes.")
@click.option("--compute", multiple=True, help="Only these dtypes of ours. Repeatable.")
@click.option("--peers/--no-peers", default=True, help="Also run PEFT, at 1B.")
@click.option("--json", "json_path", type=click.Path(path_type=Path))
def main(
    shape_name: str,
    directory: Path | None,
    tokens: int,
    rank: int,
    steps: int,
    threads: int,
    limit: int | None,
    compute: tuple[str, ...],
    peers: bool,
    json_path: Path | None,
) -> None:
    """Measure, print a table, write JSON."""
    streamed = shape_name != "1b"
    jobs = [
        (kind, dtype)
        for kind, dtype in _OURS
        if (not compute or dtype in compute) and not (streamed and kind == "ours-recompute")
    ]
    if peers and not streamed:
        jobs += _PEERS
    common = [
        "--tokens", str(tokens), "--rank", str(rank), "--steps", str(steps),
        "--threads", str(threads),
    ]  # fmt: skip
    if streamed:
        common += ["--cold", "--recompute", *(["--limit", str(limit)] if limit else [])]
    with tempfile.TemporaryDirectory() as scratch:
        shape = _SHAPES[shape_name]
        bundle = write_bundle(shape, (directory or Path(scratch)) / shape.name)
        results = [_run(kind, os.fspath(bundle), dtype, common) for kind, dtype in jobs]
    _report(jobs, results)
    if json_path:
        rows = [{"kind": k, "compute": c, **r} for (k, c), r in zip(jobs, results, strict=True)]
        json_path.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=2) + "\n")


def _run(kind: str, bundle: str, dtype: str, common: list[str]) -> dict[str, Any]:
    program = Path(__file__).with_name("train_step.py")
    arguments = [kind.removesuffix("-recompute"), bundle, "--compute", dtype, *common]
    if kind.endswith("-recompute"):
        arguments.append("--recompute")
    child = subprocess.run(
        [sys.executable, os.fspath(program), *arguments], capture_output=True, text=True
    )
    if child.returncode:
        raise click.ClickException(child.stderr[-2000:])
    facts: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    return facts


def _report(jobs: list[tuple[str, str]], results: list[dict[str, Any]]) -> None:
    head = (
        "",
        "step s",
        "CPU s",
        "anon MB",
        "RSS MB",
        "stall s",
        "decode s",
        "loss",
        "step / ours",
    )
    click.echo(("{:<30}" + "{:>12}" * (len(head) - 1)).format(*head))
    ours = {
        dtype: _counted(facts["step_seconds"])
        for (kind, dtype), facts in reversed(list(zip(jobs, results, strict=True)))
        if kind.startswith("ours")
    }
    for (kind, dtype), facts in zip(jobs, results, strict=True):
        step = _counted(facts["step_seconds"])
        cells = (
            f"{step:.2f}", f"{_counted(facts['step_cpu_seconds']):.2f}",
            f"{facts['anonymous'] / 1e6:.0f}", f"{facts['resident'] / 1e6:.0f}",
            f"{facts['stall_seconds']:.2f}" if "stall_seconds" in facts else "-",
            f"{facts['decode_seconds']:.2f}" if "decode_seconds" in facts else "-",
            f"{facts['losses'][0]:.5f}", f"{step / ours[dtype]:.2f}" if dtype in ours else "-",
        )  # fmt: skip
        click.echo(f"{_NAMES[kind] + ', ' + dtype:<30}" + "".join(f"{cell:>10}" for cell in cells))


def _counted(seconds: list[float]) -> float:
    """Return the median without the first, which touches fresh memory."""
    return median(seconds[1:] or seconds)


if __name__ == "__main__":
    main()
