"""Buffers that are used again.

Fresh memory costs a page fault for every 4 KiB, more than the arithmetic of a merge does.
"""

from __future__ import annotations

import threading
from collections import deque

import torch

__all__ = ["BufferPool"]

#: Below this, the allocator does as well.
_LEAST = 1 << 20
_SPARE_BYTES = 16 << 20


class BufferPool:
    """Hands out byte buffers and takes them back; free ones are at most twice the largest seen.

    Examples
    --------
    >>> pool = BufferPool()
    >>> first = pool.take(2 << 20)
    >>> pool.give(first)
    >>> pool.take(2 << 20).data_ptr() == first.data_ptr()
    True
    """

    def __init__(self) -> None:
        self._free: deque[torch.Tensor] = deque()
        self._largest = 0
        self._lock = threading.Lock()

    def take(self, nbytes: int) -> torch.Tensor:
        """Return a flat uint8 tensor of at least ``nbytes``, with anything in it."""
        with self._lock:
            self._largest = max(self._largest, nbytes)
            fitting = [b for b in self._free if nbytes <= b.numel() <= 2 * nbytes]
            if fitting:
                best = min(fitting, key=torch.Tensor.numel)
                self._free = deque(b for b in self._free if b is not best)
                return best
        return torch.empty(nbytes, dtype=torch.uint8)

    def give(self, buffer: torch.Tensor) -> None:
        """Take a buffer back; nothing may look at it any more."""
        if buffer.numel() < _LEAST:
            return
        with self._lock:
            self._free.append(buffer)
            while sum(b.numel() for b in self._free) > 2 * self._largest + _SPARE_BYTES:
                self._free.popleft()
