"""Kill conversions with SIGKILL and look at what is left.

After each kill the output must be absent, the old one, or complete; a rerun must finish
it, byte for byte as an uninterrupted run does, and leave nothing else behind::

    python tools/crash.py --kills 500
    python tools/crash.py --every-step --replace

Needs ``fork``, so Linux or another Unix.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import click

__all__ = ["Bench", "digests", "steps", "write_model"]

#: Functions of ``os`` that change the disk; writing itself is watched in the file object.
_STEPS = ("mkdir", "fsync", "link", "replace", "rename", "unlink", "rmdir")


@contextmanager
def steps(act: Callable[[int, str], None]) -> Iterator[None]:
    """Call ``act`` with a number, from 1, and a name before each step that changes the disk.

    Parameters
    ----------
    act : callable
        May raise, kill, or only take notes.
    """
    number = itertools.count(1)

    def watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            act(next(number), name)
            return function(*arguments, **options)

        return call

    class WatchedFile(io.FileIO):
        def write(self, data: Any, /) -> int:
            act(next(number), "write")
            return super().write(data)

    fdopen = os.fdopen

    def open_watched(descriptor: int, mode: str = "r", *rest: Any, **options: Any) -> Any:
        if mode == "wb":
            return WatchedFile(descriptor, mode)
        return fdopen(descriptor, mode, *rest, **options)

    from loraformat.storage import atomic_output
    from loraformat.storage.atomic_swap import swap_directories

    with ExitStack() as patches:
        for name in _STEPS:
            patches.enter_context(mock.patch.object(os, name, watched(name, getattr(os, name))))
        patches.enter_context(mock.patch.object(os, "fdopen", open_watched))
        exchange = watched("exchange", swap_directories)
        patches.enter_context(mock.patch.object(atomic_output, "swap_directories", exchange))
        yield


def digests(directory: Path) -> dict[str, str]:
    """Return the SHA-256 of every file under a directory, by relative path."""
    return {
        str(path.relative_to(directory)): sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def write_model(directory: Path, *, layers: int = 6, width: int = 64, seed: int = 0) -> Path:
    """Write a small dense model with random weights and return its directory.

    Parameters
    ----------
    directory : Path
    layers, width, seed : int
    """
    import numpy
    from safetensors.numpy import save_file

    numbers = numpy.random.default_rng(seed)
    shapes = {"model.embed_tokens.weight": (2 * width, width), "model.norm.weight": (width,)}
    for layer in range(layers):
        shapes[f"model.layers.{layer}.input_layernorm.weight"] = (width,)
        for name in ("self_attn.q_proj", "mlp.up_proj"):
            shapes[f"model.layers.{layer}.{name}.weight"] = (width, width)
    tensors = {
        name: numbers.standard_normal(shape, dtype=numpy.float32) for name, shape in shapes.items()
    }
    directory.mkdir(parents=True)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": width,
        "num_attention_heads": 4,
        "num_hidden_layers": layers,
        "num_key_value_heads": 4,
        "vocab_size": 2 * width,
    }
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (directory / "tokenizer.json").write_text('{"version": "1.0"}\n')
    return directory


@dataclass
class Bench:
    """A conversion that is killed over and over.

    Attributes
    ----------
    room : Path
        An empty directory; the output appears in it.
    source : Path
    to_format : str
    shard_limit : int
    replace : bool
        Let the conversion replace an older output.
    sync : bool
        Wait for the disk; a kill, unlike a power cut, does not need it.
    """

    room: Path
    source: Path
    to_format: str = "loraformat"
    shard_limit: int = 20_000
    replace: bool = False
    sync: bool = True

    def __post_init__(self) -> None:
        self.target = self.room / "output"
        self.old: dict[str, str] = {}
        if self.replace:
            self._run_or_die(self.shard_limit * 1000)  # another layout, so other bytes
            self.target.rename(self.room.parent / "old")
            self.old = digests(self.room.parent / "old")
        self._run_or_die(self.shard_limit)
        shutil.rmtree(self.target)
        began = time.perf_counter()
        self._run_or_die(self.shard_limit)
        self.seconds = time.perf_counter() - began
        self.new = digests(self.target)
        self.reset()

    def reset(self) -> None:
        """Bring back the state before the conversion."""
        shutil.rmtree(self.room)
        self.room.mkdir()
        if self.replace:
            shutil.copytree(self.room.parent / "old", self.target)

    def _convert(self, shard_limit: int) -> None:
        from loraformat.ops.convert.convert import convert

        convert(
            self.source, self.target, to_format=self.to_format, max_shard_size=shard_limit,
            force=self.replace or self.target.exists(),
        )  # fmt: skip

    def start(self, watch: Callable[[int, str], None] | None = None) -> int:
        """Start the conversion in a child and return its process id."""
        process = os.fork()
        if process:
            return process
        if not self.sync:
            os.fsync = lambda fd: None
        try:
            if watch is None:
                self._convert(self.shard_limit)
            else:
                with steps(watch):
                    self._convert(self.shard_limit)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)

    def _run_or_die(self, shard_limit: int) -> None:
        before, self.shard_limit = self.shard_limit, shard_limit
        _, status = os.waitpid(self.start(), 0)
        self.shard_limit = before
        if status:
            raise click.ClickException("the conversion fails without being killed")

    def state(self) -> str:
        """Return ``nothing``, ``old``, ``new`` or ``broken``: what stands at the output."""
        if not self.target.exists():
            return "broken" if self.replace else "nothing"
        found = digests(self.target)
        return "new" if found == self.new else "old" if found == self.old else "broken"

    def finish(self) -> bool:
        """Run to the end and tell whether the output is right and nothing else is left."""
        _, status = os.waitpid(self.start(), 0)
        alone = [path.name for path in self.room.iterdir()] == [self.target.name]
        return not status and alone and self.state() == "new"


def _kill_at_random(bench: Bench, kills: int, seed: int, report: Counter[str]) -> None:
    numbers = random.Random(seed)
    for _ in range(kills):
        process = bench.start()
        time.sleep(numbers.uniform(0, 1.1 * bench.seconds))
        os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        report["killed" if os.WIFSIGNALED(status) else "too late"] += 1
        _judge(bench, report, finish=numbers.random() < 0.5)


def _kill_at_every_step(bench: Bench, report: Counter[str]) -> None:
    for wanted in itertools.count(1):

        def kill(number: int, name: str, wanted: int = wanted) -> None:
            if number == wanted:
                os.kill(os.getpid(), signal.SIGKILL)

        _, status = os.waitpid(bench.start(kill), 0)
        if not os.WIFSIGNALED(status):
            report["steps"] = wanted - 1
            return
        report["killed"] += 1
        _judge(bench, report, finish=True)


def _judge(bench: Bench, report: Counter[str], *, finish: bool) -> None:
    state = bench.state()
    report[f"left {state}"] += 1
    if state == "broken":
        bench.reset()
    elif finish or state == "new":  # else the next kill hits a run that continues this one
        report["finished" if bench.finish() else "not finished"] += 1
        bench.reset()


@click.command()
@click.option("--kills", default=100, show_default=True, help="How many, at random moments.")
@click.option("--every-step", is_flag=True, help="Before every step that changes the disk instead.")
@click.option("--replace", is_flag=True, help="Let the conversion replace an older output.")
@click.option("--no-sync", is_flag=True, help="Do not wait for the disk: faster.")
@click.option("--source", type=click.Path(path_type=Path, exists=True), help="A model to convert.")
@click.option("--to", "to_format", default="loraformat", show_default=True)
@click.option("--max-shard-bytes", default=20_000, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(
    kills: int,
    every_step: bool,
    replace: bool,
    no_sync: bool,
    source: Path | None,
    to_format: str,
    max_shard_bytes: int,
    seed: int,
) -> None:
    """Kill a conversion again and again; exit 1 if one left anything broken."""
    from loraformat import plugins

    # Once, before the forks; and what is not needed would only make them slower.
    quantizes = ("loraformat.nf4.codec",) if to_format != "safetensors" else ()
    for module in (*quantizes, "loraformat.ops.convert.convert"):
        import_module(module)
    plugins.all_converters()
    report: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as directory:
        room = Path(directory, "room")
        room.mkdir()
        source = source or write_model(Path(directory, "model"))
        bench = Bench(room, source.resolve(), to_format, max_shard_bytes, replace, not no_sync)
        if every_step:
            _kill_at_every_step(bench, report)
        else:
            _kill_at_random(bench, kills, seed, report)
    click.echo(json.dumps(dict(sorted(report.items()))))
    sys.exit(1 if report["left broken"] or report["not finished"] or not report["killed"] else 0)


if __name__ == "__main__":
    main()
