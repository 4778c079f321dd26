"""The states of torch's generators: what is computed again draws what it drew before.

Examples
--------
>>> state = random_state([])
>>> first = torch.rand(3)
>>> with random_restored(state):
...     again = torch.rand(3)
>>> torch.equal(first, again)
True
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["RandomState", "random_restored", "random_state", "set_random"]

#: Of the CPU, and of devices.
RandomState = tuple[torch.Tensor, list[tuple[torch.device, torch.Tensor]]]


def random_state(leaves: Sequence[Any]) -> RandomState:
    """Return the state of the CPU's generator, and of those of devices on which tensors are."""
    devices = {leaf.device for leaf in leaves if torch.is_tensor(leaf) and leaf.is_cuda}
    return torch.get_rng_state(), [(d, torch.cuda.get_rng_state(d)) for d in devices]


def set_random(state: RandomState) -> None:
    """Draw from here on what was drawn after a state."""
    torch.set_rng_state(state[0])
    for device, of_device in state[1]:
        torch.cuda.set_rng_state(of_device, device)


@contextmanager
def random_restored(state: RandomState) -> Iterator[None]:
    """Draw the same random numbers again, and leave the generator as it was."""
    devices = [device for device, _ in state[1]]
    with torch.random.fork_rng(devices, device_type="cuda" if devices else "cpu"):
        set_random(state)
        yield
