"""Data parallelism over adapters: ranks started by ``torchrun``, one all-reduce per step.

The base is read-only and the same for all, so nothing of it is sent; ranks on one machine share
its pages. Sent is one flat vector per step: the adapter's gradients, and with them the sums that
every rank needs.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from loraformat.errors import LoraFormatError, UsageError, printable

__all__ = ["World", "added_up", "own_device"]


def added_up(members: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return the sums over the members that `World.gather` returned.

    Examples
    --------
    >>> added_up([{"count": torch.tensor(2.0)}, {"count": torch.tensor(3.0)}])
    {'count': tensor(5.)}
    """
    first = members[0]
    return {name: torch.stack([member[name] for member in members]).sum(0) for name in first}


def own_device(device: str) -> str:
    """Return the GPU of this process, of those that ``torchrun`` started on this machine.

    Examples
    --------
    >>> own_device("cpu")
    'cpu'
    """
    local = os.environ.get("LOCAL_RANK")
    return f"cuda:{local}" if device == "cuda" and local is not None else device


@contextmanager
def _talking() -> Iterator[None]:
    """Say of a process that has ended what it means for those that wait for it."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise LoraFormatError(
            f"another process of this run has ended, or does not answer: {printable(error)}",
            hint="see its output; resume the run with --resume",
        ) from error


class World:
    """The processes of one run; by default this one alone. Rank 0 writes."""

    def __init__(self, rank: int = 0, size: int = 1, *, joined: bool = False) -> None:
        self.rank, self.size, self._joined = rank, size, joined

    @classmethod
    def join(cls, device: str = "cpu") -> World:
        """Join the processes that ``torchrun`` has started, if it has, with this one's device.

        On GPUs NCCL talks, else gloo. The environment must name a meeting point, too.
        """
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size <= 1:
            return cls()
        if "RANK" not in os.environ or "MASTER_ADDR" not in os.environ:
            raise UsageError(
                f"WORLD_SIZE is {size}, but RANK or MASTER_ADDR is not set",
                hint="start it with torchrun",
            )
        on_gpu = device.startswith("cuda")
        if on_gpu:
            torch.cuda.set_device(torch.device(device))
        joined = not dist.is_initialized()
        if joined:
            # Gradients travel from GPU to GPU, second moments are on the CPU.
            dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
        return cls(dist.get_rank(), dist.get_world_size(), joined=joined)

    @property
    def is_main_process(self) -> bool:
        """Whether this process writes and talks."""
        return self.rank == 0

    @_talking()
    def sum(self, vector: torch.Tensor) -> None:
        """Add up a vector over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(vector)

    def sum_numbers(self, numbers: Sequence[float], device: str | torch.device) -> list[float]:
        """Return numbers added up over all ranks, in float64."""
        if self.size == 1:
            return list(numbers)
        vector = torch.tensor(list(numbers), dtype=torch.float64, device=device)
        self.sum(vector)
        return list(vector.tolist())

    @_talking()
    def gather(self, tensors: Mapping[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        """Return every rank's tensors; all ranks name the same, of the same shapes."""
        if self.size == 1:
            return [dict(tensors)]
        gathered: list[dict[str, torch.Tensor]] = [{} for _ in range(self.size)]
        for name, tensor in tensors.items():
            copies = [torch.empty_like(tensor) for _ in range(self.size)]
            dist.all_gather(copies, tensor.contiguous())
            for copied, members in zip(copies, gathered, strict=True):
                members[name] = copied
        return gathered

    @_talking()
    def broadcast_object(self, value: Any) -> Any:
        """Return rank 0's value, a JSON-like object, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    @_talking()
    def broadcast_parameters(self, tensors: Iterable[torch.Tensor]) -> None:
        """Give every rank the numbers of rank 0's tensors."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor.detach(), src=0)

    def leave(self) -> None:
        """End the talk, if `join` began it."""
        if self._joined:
            dist.destroy_process_group()
