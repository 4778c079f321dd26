"""Checkpoints of a run: its whole state, saved atomically.

A checkpoint is a directory ``step-00000012`` with ``state.safetensors`` (parameters, optimizer
states, statistics) and ``checkpoint.json`` (step, position in the data, losses, the options that
the run was started with, and the hash of the state). It is prepared beside, synced and renamed;
there is no pickle in it.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from loraformat.errors import FormatError, InputError, printable
from loraformat.storage import strict_json
from loraformat.storage.atomic_output import AtomicOutput
from loraformat.storage.durable import write_all
from loraformat.storage.safe_directory import SafeDirectory
from loraformat.tensors.arrays import array_bytes, array_view
from loraformat.tensors.dtypes import TORCH_NAMES
from loraformat.tensors.header import Entry, encode_header
from loraformat.tensors.mapped import MappedFile
from loraformat.tensors.torch_arrays import array_of, tensor_of

__all__ = ["Checkpoint", "RunState", "name_of", "newest", "prune", "read", "write"]

_STATE = "state.safetensors"
_FACTS = "checkpoint.json"
_ADAPTER = "adapter"
_NAME = re.compile(r"step-(\d{8,12})")
_MAX_FACTS_BYTES = 16 << 20
_DTYPES = {torch_name: name for name, torch_name in TORCH_NAMES.items()}


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint that was read and whose hashes agree."""

    path: Path
    facts: dict[str, Any]  #: what `write` was given
    tensors: dict[str, torch.Tensor]  #: views on the mapped file, to be copied from

    @property
    def step(self) -> int:
        """Number of steps made."""
        return int(self.facts["step"])

    def part(self, prefix: str) -> dict[str, torch.Tensor]:
        """Return the tensors whose names begin so, by the rest of the name."""
        return {
            name.removeprefix(prefix): value
            for name, value in self.tensors.items()
            if name.startswith(prefix)
        }


def write(
    target: Path,
    facts: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    *,
    save_adapter: Callable[[Path], object] | None = None,
) -> None:
    """Write a checkpoint; it appears when it is whole and on the disk.

    Its directory is replaced if it exists; the parent must. `facts` are JSON values, with ``step``.
    `save_adapter` writes the adapter, for people to try out, to the path that it is given.

    Raises
    ------
    ResourceError
        If the disk is full; what existed is unchanged.
    """
    with AtomicOutput(target, plan="checkpoint", force=True) as publication:
        publication.check_space(sum(t.numel() * t.element_size() for t in tensors.values()))
        digest = _write_state(publication, tensors)
        told = {**facts, "schema": "loraformat.checkpoint", "schema_version": 1, "state": digest}
        told["sha256"] = _digest(told)
        publication.write(_FACTS, json.dumps(told, indent=1, sort_keys=True).encode())
        if save_adapter is not None:
            save_adapter(publication.work / _ADAPTER)
        publication.commit()


def _write_state(publication: AtomicOutput, tensors: Mapping[str, torch.Tensor]) -> str:
    # The widest types first, as the safetensors library does it, so that each is aligned.
    ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())
    entries, position = [], 0
    for name, tensor in ordered:
        end = position + tensor.numel() * tensor.element_size()
        dtype = _DTYPES[str(tensor.dtype).removeprefix("torch.")]
        entries.append(Entry(name, dtype, tuple(tensor.shape), position, end))
        position = end
    digest = sha256()
    with publication.create(_STATE) as file:
        header = encode_header(entries, {"format": "pt"})
        digest.update(header)
        write_all(file, header)
        for _, tensor in ordered:
            data = array_bytes(array_of(tensor.cpu()))
            digest.update(data)
            write_all(file, data)
    return digest.hexdigest()


def _digest(facts: Mapping[str, Any]) -> str:
    rest = {name: value for name, value in facts.items() if name != "sha256"}
    return sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read(path: Path) -> Checkpoint:
    """Read a checkpoint and check its hashes.

    Raises
    ------
    InputError
        If it is incomplete or damaged.
    """
    folder = SafeDirectory(path)
    facts = _read_facts(folder)
    file = MappedFile(folder, _STATE)
    whole = sha256(file.bytes_between(0, file.nbytes)).hexdigest()
    if whole != facts["state"]:
        raise InputError("was modified after it was written", path=file.path)
    tensors = {
        name: tensor_of(array_view(file.view(name), entry.dtype, entry.shape))
        for name, entry in file.header.entries.items()
    }
    return Checkpoint(path, facts, tensors)


def _read_facts(folder: SafeDirectory) -> dict[str, Any]:
    path = folder.path / _FACTS
    try:
        facts = strict_json.loads(folder.read(_FACTS, _MAX_FACTS_BYTES))
    except ValueError as error:
        raise InputError(f"is damaged: {error}", path=path) from None
    if not isinstance(facts, dict) or facts.get("schema") != "loraformat.checkpoint":
        raise InputError("is not a checkpoint of a training run", path=path)
    if facts.get("schema_version") != 1:
        version = printable(facts.get("schema_version"))
        raise InputError(f"has schema version {version}, wanted 1", path=path)
    if facts.get("sha256") != _digest(facts):
        raise InputError("was modified after it was written", path=path)
    return facts


def newest(directory: Path) -> tuple[Checkpoint | None, list[str]]:
    """Return the newest checkpoint that is whole, and what was wrong with newer ones.

    The directory need not exist.
    """
    problems: list[str] = []
    for path in reversed(_found(directory)):
        try:
            return read(path), problems
        except (InputError, FormatError) as error:
            problems.append(str(error))
    return None, problems


def _found(directory: Path) -> list[Path]:
    if not directory.is_dir():
        return []
    steps = {
        int(match[1]): path
        for path in directory.iterdir()
        if (match := _NAME.fullmatch(path.name)) and path.is_dir()
    }
    return [steps[step] for step in sorted(steps)]


def name_of(step: int) -> str:
    """Return the name of a step's directory.

    Examples
    --------
    >>> name_of(12)
    'step-00000012'
    """
    return f"step-{step:08d}"


def prune(directory: Path, keep: int) -> None:
    """Remove all checkpoints but the newest so many, the oldest first."""
    for path in _found(directory)[: -keep or None]:
        gone = path.with_name(path.name + ".old")
        shutil.rmtree(gone, ignore_errors=True)
        path.rename(gone)  # so that a half removed one is never taken for one
        shutil.rmtree(gone)


@dataclass(slots=True)
class RunState:
    """Counts, and losses where they were measured, at the end of a step, on all ranks.

    Examples
    --------
    >>> state = RunState()
    >>> [state.take_evaluation(loss) for loss in (2.0, 1.5, 1.75)], state.stale
    ([True, True, False], 1)
    """

    step: int = 0
    cursor: dict[str, Any] = field(default_factory=dict)  #: place in the data; empty at the start
    tokens: int = 0
    trained: int = 0  #: target tokens among these
    evaluated: int = -1  #: step of the last held-out evaluation, -1 before the first
    first_loss: float | None = None  #: mean loss per target token in a step
    last_loss: float | None = None
    first_eval: float | None = None  #: held-out loss
    best_eval: float | None = None
    last_eval: float | None = None
    best_step: int | None = None
    stale: int = 0  #: evaluations since the best
    seconds: float = 0.0  #: over all starts of this run

    def take_step(self, loss: float, trained: int, tokens: int) -> None:
        """Count one step."""
        self.step += 1
        self.trained += trained
        self.tokens += tokens
        self.first_loss = loss if self.first_loss is None else self.first_loss
        self.last_loss = loss

    def take_evaluation(self, loss: float) -> bool:
        """Count one evaluation, and return whether it is the best so far."""
        self.evaluated = self.step
        self.first_eval = loss if self.first_eval is None else self.first_eval
        self.last_eval = loss
        better = math.isfinite(loss) and (self.best_eval is None or loss < self.best_eval)
        if better:
            self.best_eval, self.best_step, self.stale = loss, self.step, 0
        else:
            self.stale += 1
        return better

    @classmethod
    def from_json(cls, members: Mapping[str, Any]) -> RunState:
        """Return the state that `asdict` gave; InputError if members are missing or strange."""
        names = {entry.name for entry in fields(cls)}
        if set(members) != names or not isinstance(members["cursor"], dict):
            raise InputError("the checkpoint does not say where its run stood")
        return cls(**members)
