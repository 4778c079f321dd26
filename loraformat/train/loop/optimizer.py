"""The optimizer: AdamW or SGD, with states in memory, on a disk, or in eight bits; LoRA+ groups.

States are made at the beginning, not at the first step, so that their size is known, and so that
those of a checkpoint can be copied into them. States on a disk are tensors in a file without a
name: the kernel writes their pages back and drops them when it wants the memory, and nothing stays
on the disk when the process ends, however it ends.

LoRA+ (Hayou 2024, section 4): B begins at zero, so it gets a multiple of the learning rate of A;
the paper proposes 16. An embedding's factors and DoRA's magnitudes keep the plain rate.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from loraformat.errors import InputError, MissingDependencyError, UsageError, printable
from loraformat.storage.atomic_output import disk_full
from loraformat.train.loop.optimizer_options import OptimizerOptions

__all__ = ["DiskStates", "Optimizer", "check_optimizer", "parameter_groups", "rate_ratios"]

#: Bytes of parameters that are updated together when states are on a disk.
_PART_BYTES = 64 << 20

_ALIGNMENT = 64

_FASTER = ".lora_B.weight"


class Optimizer:
    """Updates named parameters (float32) from their gradients.

    `ratios` are what learning rates are multiplied by, by name: LoRA+ (Hayou 2024). States on a
    disk are in `directory`; ResourceError says that it has no room for them.

    Examples
    --------
    >>> weight = torch.nn.Parameter(torch.ones(2, 2))
    >>> optimizer = Optimizer({"w": weight}, OptimizerOptions("sgd"))
    >>> weight.grad = torch.ones(2, 2)
    >>> optimizer.step(0.25)
    >>> weight.tolist()
    [[0.75, 0.75], [0.75, 0.75]]
    """

    def __init__(
        self,
        parameters: Mapping[str, torch.nn.Parameter],
        options: OptimizerOptions,
        *,
        ratios: Mapping[str, float] | None = None,
        directory: Path | None = None,
    ) -> None:
        on_gpu = any(parameter.is_cuda for parameter in parameters.values())
        check_optimizer(options, on_gpu=on_gpu)
        self._parameters = dict(parameters)
        self._ratios = {name: float((ratios or {}).get(name, 1.0)) for name in parameters}
        self._disk: DiskStates | None = None
        make = _maker(options)
        parts = [list(parameters)] if options.states == "memory" else _parts(parameters)
        self._parts = [make(self._groups(names, options.weight_decay)) for names in parts]
        self._homes = {
            parameter: part
            for part in self._parts
            for group in part.param_groups
            for parameter in group["params"]
        }
        if options.states == "disk":
            assert directory is not None
            self._disk = DiskStates(directory, [p.shape for p in parameters.values() for _ in "ab"])
        if options.kind == "adamw":
            self._make_adam_states()
        elif "8bit" in options.kind:
            self._make_8bit_states()

    def _groups(self, names: Sequence[str], decay: float) -> list[dict[str, Any]]:
        """Return torch's parameter groups: one per learning rate and weight decay."""
        groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
        for name in names:
            parameter = self._parameters[name]
            key = self._ratios[name], decay if parameter.ndim > 1 else 0.0
            groups.setdefault(key, []).append(parameter)
        return [
            {"params": members, "weight_decay": decayed, "ratio": ratio}
            for (ratio, decayed), members in groups.items()
        ]

    def _make_8bit_states(self) -> None:
        for part in self._parts:
            for g, group in enumerate(part.param_groups):
                for p, parameter in enumerate(group["params"]):
                    part.init_state(group, parameter, g, p)  # type: ignore[attr-defined]

    def _make_adam_states(self) -> None:
        on_disk = iter(self._disk.tensors if self._disk is not None else ())
        for parameter in self._parameters.values():
            mean, square = (
                torch.zeros_like(parameter) if self._disk is None else next(on_disk)
                for _ in range(2)
            )
            self._homes[parameter].state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": mean.detach(),
                "exp_avg_sq": square.detach(),
            }

    def step(self, learning_rate: float) -> None:
        """Update every parameter that has a gradient, and drop the gradients."""
        for part in self._parts:
            for group in part.param_groups:
                group["lr"] = learning_rate * group["ratio"]
            part.step()
            part.zero_grad()
            if self._disk is not None:
                self._disk.release()

    def forget_gradients(self) -> None:
        """Drop the gradients of a step that is not made."""
        for part in self._parts:
            part.zero_grad()

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the states that a checkpoint keeps, not copied, by ``KIND:PARAMETER``."""
        found = self._states(torch.Tensor)
        return {name: value for name, value in found.items() if not name.startswith("qmap")}

    def numbers(self) -> dict[str, int | float]:
        """Return the states that are plain numbers, in the same way."""
        return self._states(int | float)

    def restore(
        self, tensors: Mapping[str, torch.Tensor], numbers: Mapping[str, int | float]
    ) -> None:
        """Take over the states of a checkpoint, which must be those of these parameters."""
        mine = self.tensors()
        if set(mine) != set(tensors) or set(self.numbers()) != set(numbers):
            odd = sorted(set(mine) ^ set(tensors) or set(self.numbers()) ^ set(numbers))[0]
            raise InputError(f"optimizer state {printable(odd)} is missing, or one too many")
        for name, value in mine.items():
            if value.shape != tensors[name].shape or value.dtype != tensors[name].dtype:
                raise InputError(f"optimizer state {printable(name)} has another shape or type")
            value.copy_(tensors[name])
        for key, own in self.numbers().items():
            kind, _, name = key.partition(":")
            parameter = self._parameters[name]
            self._homes[parameter].state[parameter][kind] = type(own)(numbers[key])

    def _states(self, wanted: Any) -> dict[str, Any]:
        """Return the states that are of a type."""
        return {
            f"{kind}:{name}": value
            for name, parameter in self._parameters.items()
            for kind, value in self._homes[parameter].state[parameter].items()
            if isinstance(value, wanted)
        }


def check_optimizer(options: OptimizerOptions, *, on_gpu: bool) -> None:
    """Refuse states that cannot be kept where they are asked for, or lack bitsandbytes."""
    if options.kind.startswith("paged") and not on_gpu:
        raise UsageError(
            "paged states need a GPU", hint="use --optimizer-states disk, or --optimizer adamw-8bit"
        )
    if options.states == "disk" and on_gpu:
        raise UsageError(
            "optimizer states of a GPU run cannot be kept on disk",
            hint="use --optimizer paged-adamw-8bit",
        )
    if "8bit" in options.kind and find_spec("bitsandbytes") is None:
        raise MissingDependencyError(
            f"the optimizer {options.kind} needs bitsandbytes", hint="run: pip install bitsandbytes"
        )


def _parts(parameters: Mapping[str, torch.nn.Parameter]) -> list[list[str]]:
    """Split the parameters into parts, so that not all states are in memory at once."""
    parts: list[list[str]] = [[]]
    filled = 0
    for name, parameter in parameters.items():
        if parts[-1] and filled + parameter.numel() * 4 > _PART_BYTES:
            parts.append([])
            filled = 0
        parts[-1].append(name)
        filled += parameter.numel() * 4
    return parts


def _maker(options: OptimizerOptions) -> Callable[[list[dict[str, Any]]], torch.optim.Optimizer]:
    if options.kind == "sgd":
        return partial(torch.optim.SGD, lr=0.0, foreach=False)
    if options.kind == "adamw":
        kind = partial(torch.optim.AdamW, fused=True)
    else:
        import bitsandbytes.optim as eight_bit

        paged = options.kind.startswith("paged")
        kind = partial(eight_bit.PagedAdamW8bit if paged else eight_bit.AdamW8bit)
    return partial(kind, lr=0.0, betas=options.betas, eps=options.epsilon)


class DiskStates:
    """Zeros on a disk, as float32 `tensors` of some shapes that share the memory of a file.

    Room is reserved at once, since a mapped file that runs out of it would end the process later.
    """

    def __init__(self, directory: Path, shapes: Sequence[Sequence[int]]) -> None:
        if not hasattr(mmap, "MADV_DONTNEED") or not hasattr(os, "posix_fallocate"):
            raise UsageError("optimizer states on disk need Linux", hint="keep them in memory")
        counts = [math.prod(shape) for shape in shapes]
        starts = [0, *accumulate(-(-count * 4 // _ALIGNMENT) * _ALIGNMENT for count in counts)]
        self.nbytes = max(starts[-1], _ALIGNMENT)
        try:
            with tempfile.TemporaryFile(dir=directory) as file:
                os.posix_fallocate(file.fileno(), 0, self.nbytes)
                self._map = mmap.mmap(file.fileno(), self.nbytes)
        except OSError as error:
            raise disk_full(error, directory) from error
        self.tensors = [
            torch.frombuffer(self._map, dtype=torch.float32, count=count, offset=start).view(*shape)
            if count
            else torch.zeros(*shape)
            for count, start, shape in zip(counts, starts, shapes, strict=False)
        ]

    def release(self) -> None:
        """Take the pages out of this process; they stay in the file."""
        with contextlib.suppress(OSError):
            self._map.madvise(mmap.MADV_DONTNEED)


def rate_ratios(names: Iterable[str], ratio: float) -> dict[str, float]:
    """Return what the learning rate of each parameter is multiplied by: that of B by `ratio`.

    Parameters are named as by `loraformat.train.lora.branches.trainable`.

    Raises
    ------
    UsageError
        If the ratio is below 1.

    Examples
    --------
    >>> rate_ratios(["q.lora_A.weight", "q.lora_B.weight"], 16.0)
    {'q.lora_A.weight': 1.0, 'q.lora_B.weight': 16.0}
    """
    if not ratio >= 1:
        raise UsageError(f"the learning-rate ratio of B is {ratio}, wanted at least 1")
    return {name: ratio if name.endswith(_FASTER) else 1.0 for name in names}


def parameter_groups(
    parameters: Mapping[str, torch.nn.Parameter],
    lr: float,
    *,
    ratio: float = 1.0,
    weight_decay: float = 0.0,
) -> list[dict[str, object]]:
    """Return groups for an optimizer of torch.

    Magnitudes are not decayed: they have no reason to be small.

    Parameters
    ----------
    parameters : mapping of str to torch.nn.Parameter
        As `loraformat.train.lora.branches.trainable` names them.
    lr : float
    ratio : float
        As in `rate_ratios`.
    weight_decay : float

    Returns
    -------
    list of dict
        With ``params``, ``names``, ``lr`` and ``weight_decay``; none is empty.

    Raises
    ------
    UsageError
        If the ratio is below 1.

    Examples
    --------
    >>> from torch.nn import Parameter
    >>> q = {f"q.lora_{which}.weight": Parameter(torch.ones(1, 1)) for which in "AB"}
    >>> [(g["names"], g["lr"]) for g in parameter_groups(q, 0.1, ratio=2.0)]
    [(['q.lora_A.weight'], 0.1), (['q.lora_B.weight'], 0.2)]
    """
    found: dict[tuple[float, float], list[str]] = {}
    for name, faster in rate_ratios(parameters, ratio).items():
        decay = 0.0 if name.endswith("lora_magnitude_vector") else weight_decay
        found.setdefault((lr * faster, decay), []).append(name)
    return [
        {
            "params": [parameters[name] for name in names],
            "names": names,
            "lr": rate,
            "weight_decay": decay,
        }
        for (rate, decay), names in found.items()
    ]
