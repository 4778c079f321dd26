"""Measure how the memory of a training step grows with the layers, and what streaming does to it.

Every row is a process of its own: one step to warm up, one that is measured. Anonymous memory is
sampled at every entry into a layer; growth is what a step adds to what the process held before
it. The model has random weights; its head is small, so that layers are what is seen. "Page cache
dropped" asks the kernel to forget a layer's file pages whenever it is left, as if memory were full:
every layer is then read from the disk, twice in a step.

Example
-------
    python tools/bench/train_memory.py --layers 4 8 16 32 --json memory.json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))  # run as a file, too

from bundles import write_bundle
from process import machine
from shapes import Shape

SHAPE = Shape("streamed", 1024, 2816, 4, 16, 4, 64, 4096)
TOKENS = 256
#: What each row changes: prefetcher settings, and whether glibc's threshold is pinned.
SETTINGS: dict[str, dict[str, bool]] = {
    "default": {},
    "default, page cache dropped": {"drop_cache": True},
    "no prefetch, page cache dropped": {"prefetch": False, "drop_cache": True},
    "no prefetch": {"prefetch": False},
    "no release": {"release": False},
    "malloc as it is": {"malloc": False},
}


def step(bundle: str, settings: dict[str, bool], threads: int) -> dict[str, Any]:
    """Take two steps in this process and return the figures of the second."""
    from loraformat.train import Batch, LoraOptions, load, opening

    torch.set_num_threads(threads)
    settings = dict(settings)
    if not settings.pop("malloc", True):
        opening.keep_freed_memory = lambda plentiful: False  # type: ignore[attr-defined]
    options = LoraOptions(rank=8, statistics=False)
    model = load(bundle, lora=options, activation_memory=0)
    for name, value in settings.items():
        setattr(model.prefetcher, name, value)
    ids = torch.randint(0, 4096, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, 0] = -100
    batch = Batch(ids, labels, torch.arange(TOKENS)[None], torch.ones_like(ids), ((0,),))
    model.loss(batch).backward()
    peaks = {"RssAnon": 0, "RssFile": 0}
    enter = model.prefetcher.enter

    def watched(layer: int, direction: int) -> None:
        enter(layer, direction)
        for field, value in _resident().items():
            peaks[field] = max(peaks[field], value)

    before, traffic = _resident(), replace(model.traffic)
    decoded = model.decode_seconds
    model.prefetcher.enter = watched  # type: ignore[method-assign]
    began, processor = time.perf_counter(), time.process_time()
    model.loss(batch).backward()
    return {
        "anonymous_growth": peaks["RssAnon"] - before["RssAnon"],
        "mapped": peaks["RssFile"],
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - processor,
        "stall_seconds": model.traffic.stall_seconds - traffic.stall_seconds,
        "decode_seconds": model.decode_seconds - decoded,
        "bytes_read": model.traffic.bytes_read - traffic.bytes_read,
    }


def _resident() -> dict[str, int]:
    found = {}
    for line in Path(f"/proc/{os.getpid()}/status").read_text().splitlines():
        field, _, rest = line.partition(":")
        if field in ("RssAnon", "RssFile"):
            found[field] = int(rest.split()[0]) << 10
    return found


def measure(bundle: Path, settings: str, threads: int) -> dict[str, Any]:
    """Run `step` in a process of its own."""
    command = [sys.executable, __file__, "--step", str(bundle), "--threads", str(threads)]
    done = subprocess.run([*command, "--settings", settings], check=True, stdout=subprocess.PIPE)
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table."""
    kept = TOKENS * SHAPE.hidden * 4
    print(f"{'layers':>6}  {'setting':<32} {'anon +':>8} {'per layer':>10} {'mapped':>8} "
          f"{'CPU':>7} {'stall':>7} {'decode':>7}")  # fmt: skip
    first: dict[str, dict[str, Any]] = {}
    for row in rows:
        start = first.setdefault(row["setting"], row)
        added = row["layers"] - start["layers"]
        slope = (row["anonymous_growth"] - start["anonymous_growth"]) / added / kept if added else 0
        print(
            f"{row['layers']:>6}  {row['setting']:<32} {row['anonymous_growth'] / 2**20:>5.0f} MiB "
            f"{f'{slope:.2f} x' if added else '':>10} {row['mapped'] / 2**20:>4.0f} MiB "
            f"{row['cpu_seconds']:>6.1f}s {row['stall_seconds']:>6.2f}s "
            f"{row['decode_seconds']:>6.2f}s"
        )
    print(f"per layer: growth over that from the fewest layers, in activations of {kept} bytes")


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--directory", type=Path, help="keeps the bundles")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--step", help=argparse.SUPPRESS)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    arguments = parser.parse_args()
    if arguments.step:
        figures = step(arguments.step, SETTINGS[arguments.settings[0]], arguments.threads)
        print(json.dumps(figures))
        return
    with tempfile.TemporaryDirectory() as scratch:
        directory, rows = arguments.directory or Path(scratch), []
        for layers in arguments.layers:
            shape = replace(SHAPE, layers=layers)
            bundle = write_bundle(shape, directory / f"{layers}-layers")
            for name in arguments.settings:
                figures = measure(bundle, name, arguments.threads)
                rows.append({"layers": layers, "setting": name, **figures})
        rows.sort(key=lambda row: (list(SETTINGS).index(row["setting"]), row["layers"]))
        show(rows)
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
