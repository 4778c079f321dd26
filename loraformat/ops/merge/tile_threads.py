"""Working on the tiles of a matrix, on all CPUs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from loraformat.nf4.kernels import threads

__all__ = ["TILE_ELEMENTS", "for_each", "one_thread"]

#: Elements of a tile: it and what is computed from it stay in the cache.
TILE_ELEMENTS = 1 << 16


@contextmanager
def one_thread() -> Iterator[None]:
    """Let each torch operation of this thread run on one CPU.

    torch's own threads wait for each other after every operation; on a shared machine, and
    with operations this small, that costs more than it brings.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def for_each(work: Callable[[int], None], count: int) -> None:
    """Call ``work`` with every number, on all CPUs, each torch operation on one."""

    def task(start: int, stop: int) -> None:
        for number in range(start, stop):
            work(number)

    with one_thread():
        threads.run(task, count, 1)
