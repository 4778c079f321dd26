"""Times training steps: against PEFT on the same bundle, and on shapes that PEFT cannot hold here.

Each row is a process of its own that runs `train_step.py` beside this: forward, backward, clipping
and AdamW on one row of random tokens. The 1B shape is run by loraformat, by PEFT on bitsandbytes
NF4 and by PEFT on dense bfloat16 weights, which compute each layer again in the backward pass, and
by loraformat so, too; larger shapes by loraformat alone, each layer computed again, with a hard
limit on anonymous memory, each layer dropped from the page cache once it was used.

A machine is faster in one minute than in the next, so rounds run every row once each: a row tells
the medians of its rounds, and its ratio is the median of the ratios within rounds, with the least
and the greatest.

Example: python tools/bench/train.py 1b --steps 3 --rounds 3 --directory bundles
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
@click.option("--rounds", default=1, show_default=True, help="Runs of every row, in turn.")
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
    rounds: int,
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
        jobs = sorted([*jobs, *_PEERS], key=lambda job: job[1], reverse=True)
    common = [
        "--tokens", str(tokens), "--rank", str(rank), "--steps", str(steps),
        "--threads", str(threads),
    ]  # fmt: skip
    if streamed:
        common += ["--cold", "--recompute", *(["--limit", str(limit)] if limit else [])]
    with tempfile.TemporaryDirectory() as scratch:
        shape = _SHAPES[shape_name]
        bundle = write_bundle(shape, (directory or Path(scratch)) / shape.name)
        runs = [
            [_run(kind, os.fspath(bundle), dtype, common) for kind, dtype in jobs]
            for _ in range(rounds)
        ]
    _report(jobs, runs)
    if json_path:
        rows = [
            {"round": number, "kind": kind, "compute": dtype, **facts}
            for number, results in enumerate(runs)
            for (kind, dtype), facts in zip(jobs, results, strict=True)
        ]
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


def _report(jobs: list[tuple[str, str]], runs: list[list[dict[str, Any]]]) -> None:
    click.echo(f"{'':<30}" + "".join(f"{column:>10}" for column in _COLUMNS))
    ours = {
        dtype: index
        for index, (kind, dtype) in reversed(list(enumerate(jobs)))
        if kind.startswith("ours")
    }
    steps = [[_counted(facts["step_seconds"]) for facts in results] for results in runs]
    for index, (kind, dtype) in enumerate(jobs):
        rows = [results[index] for results in runs]
        ratios = [s[index] / s[ours[dtype]] for s in steps if dtype in ours]
        cells = (
            f"{median(seconds[index] for seconds in steps):.2f}",
            f"{median(_counted(facts['step_cpu_seconds']) for facts in rows):.2f}",
            f"{median(facts['anonymous'] for facts in rows) / 1e6:.0f}",
            f"{median(facts['resident'] for facts in rows) / 1e6:.0f}",
            *(_per_step(rows, name) for name in ("stall_seconds", "decode_seconds")),
            f"{rows[0]['losses'][0]:.5f}",
            f"{median(ratios):.2f}" if ratios else "-",
        )
        spread = f"  ({min(ratios):.2f} to {max(ratios):.2f})" if len(ratios) > 1 else ""
        name = f"{_NAMES[kind]}, {dtype}"
        click.echo(f"{name:<30}" + "".join(f"{cell:>10}" for cell in cells) + spread)


def _per_step(rows: list[dict[str, Any]], name: str) -> str:
    """Return the median of what was summed over all steps of a run, for one of them."""
    if name not in rows[0]:
        return "-"
    return f"{median(facts[name] / len(facts['step_seconds']) for facts in rows):.2f}"


def _counted(seconds: list[float]) -> float:
    """Return the median without the first, which touches fresh memory."""
    return median(seconds[1:] or seconds)


if __name__ == "__main__":
    main()
