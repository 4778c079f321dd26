"""The directory of a run, and the identity by which it is known on resumption.

::

    my-adapter               the result: a PEFT adapter, when the run is done
    my-adapter.run/
        run.yaml             the options as they took effect
        metrics.jsonl        one line per step, evaluation and sample
        loss.png             the loss curve
        checkpoints/         step-00000012, …, best
        tensorboard/

A run is resumed only with the same options, base, data and ranks; otherwise its result would be
neither the old run's nor a new one's.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from loraformat.bundle.run_paths import CURVE_NAME, run_place
from loraformat.errors import OutputError, UsageError, printable
from loraformat.storage.atomic_output import disk_full
from loraformat.storage.durable import locked, new_file, sync_directory, write_all
from loraformat.train.run.options import SETTINGS, TrainOptions

__all__ = ["RunDirectory", "check_same", "identity_of"]


class RunDirectory:
    """The directory of one run.

    Parameters
    ----------
    output : Path
        Where the adapter shall appear.

    Attributes
    ----------
    path : Path
        ``OUTPUT.run``; for an adapter in a bundle ``BUNDLE.NAME.run``, beside the bundle.
    checkpoints, tensorboard, metrics, config, picture : Path
        What is in it.
    """

    def __init__(self, output: Path) -> None:
        self.path = run_place(output)
        self.checkpoints, self.tensorboard = self.path / "checkpoints", self.path / "tensorboard"
        self.metrics, self.config = self.path / "metrics.jsonl", self.path / "run.yaml"
        self.picture = self.path / CURVE_NAME

    def nbytes(self) -> int:
        """Return the bytes of the existing checkpoints."""
        return sum(p.stat().st_size for p in self.checkpoints.rglob("*") if p.is_file())

    def begin(self, *, force: bool) -> None:
        """Make the directory for a new run.

        Raises
        ------
        OutputError
            If a run has been here, unless ``force`` says that it may go, or something else is.
        """
        if self.path.exists() and not self.path.is_dir():
            raise OutputError("is not a directory", path=self.path, hint="move it away")
        if self.metrics.exists() or self.checkpoints.exists():
            if not force:
                raise OutputError(
                    "holds a run already", path=self.path,
                    hint="resume it with --resume, or delete it and start again with --force",
                )  # fmt: skip
            self._clear()
        try:
            self.path.mkdir(exist_ok=True)
        except OSError as error:
            raise disk_full(error, self.path) from error

    def _clear(self) -> None:
        for directory in (self.checkpoints, self.tensorboard):
            if directory.is_dir() and not directory.is_symlink():
                shutil.rmtree(directory)
        for file in (self.metrics, self.config, self.picture):
            file.unlink(missing_ok=True)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other processes from training here meanwhile.

        Raises
        ------
        OutputError
            If one does.
        """
        with locked(self.path) as free:
            if not free:
                raise OutputError(
                    "is being written by another process", path=self.path,
                    hint="wait for it to end",
                )  # fmt: skip
            yield

    def write_config(self, text: str) -> None:
        """Write the options, whole or not at all."""
        beside = self.config.with_name(self.config.name + ".tmp")
        try:
            with new_file(beside) as file:
                write_all(file, text.encode("utf-8"))
                os.fsync(file.fileno())
            os.replace(beside, self.config)
            sync_directory(self.path)
        except OSError as error:
            raise disk_full(error, self.path) from error


#: The members of an identity in words.
_NAMES = {
    "base": "the base's fingerprint",
    "data": "the data's fingerprint",
    "held_out": "the held-out data's fingerprint",
    "ranks": "the number of processes",
    "steps": "the number of steps",
    "compute": "device and type of products",
}


def identity_of(options: TrainOptions, **members: Any) -> dict[str, Any]:
    """Return what a checkpoint keeps to know its run by: members by the names of `_NAMES`."""
    told = options.to_json()
    kept = {setting.flag: told[setting.flag] for setting in SETTINGS if not setting.free}
    return {"options": kept, **members}


def check_same(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to resume from another run's checkpoint.

    Raises
    ------
    UsageError
        Naming every difference.

    Examples
    --------
    >>> run = {"options": {"lr": 0.1}, "base": "ab"}
    >>> check_same(run, run)
    >>> check_same(run, {"options": {"lr": 0.2}, "base": "ab"})
    Traceback (most recent call last):
    loraformat.errors.UsageError: the run was started with other settings: --lr was 0.1 and is \
0.2; use the original settings, or start a new run with another --output
    """
    was, is_now = dict(before.get("options") or {}), dict(now["options"])
    flags = sorted(was.keys() | is_now.keys())
    names = sorted((before.keys() | now.keys()) - {"options"})
    compared = [(f"--{flag}", was.get(flag), is_now.get(flag)) for flag in flags]
    compared += [(_NAMES.get(name, name), before.get(name), now.get(name)) for name in names]
    if differences := [_difference(*one) for one in compared if one[1] != one[2]]:
        raise UsageError(
            f"the run was started with other settings: {', '.join(differences)}",
            hint="use the original settings, or start a new run with another --output",
        )


def _difference(what: str, before: object, now: object) -> str:
    def short(value: object) -> str:
        text = printable(value)
        return text if len(text) <= 40 else f"{text[:12]}…"

    return f"{what} was {short(before)} and is {short(now)}"
