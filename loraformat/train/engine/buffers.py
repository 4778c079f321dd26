"""Memory for tensors: reused buffers, allocations that fit freed memory, copies outside the heap.

Three kinds, by how long their contents live:

- `workspace`: one buffer per thread and purpose, overwritten by the next product. Fresh memory
  would cost more than what is computed in it.
- `fresh`: the result of a product. torch asks for aligned memory, and glibc does not make an
  aligned block of a freed one of the same size: it wants a few bytes more, which small objects have
  taken by then. The heap would grow with every layer. Plain memory, with room to align it in, fits
  where the last one was.
- `hold`: what a checkpointed layer keeps until its backward pass. In the heap such long-lived
  copies would lie between the short-lived tensors of their layers and keep the holes around them
  from being reused: memory would grow with every layer almost as if nothing were recomputed. In
  mappings of their own they leave the heap alone.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import threading
from collections.abc import Sequence

import numpy
import torch

from loraformat.tensors.arrays import Array
from loraformat.tensors.torch_arrays import array_of

__all__ = ["Workspace", "empty_matrix", "keep_freed_memory", "save_inputs", "workspace"]

_ALIGNMENT = 64
#: Smaller results need not be aligned (bytes).
_SMALL_RESULT = 1 << 20

#: Smaller inputs stay where they are (bytes).
_SMALL_INPUT = mmap.PAGESIZE
#: Memory of this process, counted as such; by default Python's is shared with its children.
_PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if os.name == "posix" else {}

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
#: Largest block that comes from the heap where memory is plentiful (glibc allows no more), and
#: where it is scarce (bytes).
_LARGEST_IN_HEAP = 32 << 20, 1 << 20
_NEVER = 2**31 - 1


class Workspace(threading.local):
    """One buffer for each purpose and dtype, of the thread that asks.

    Whoever takes a buffer has it until somebody takes it again for the same purpose: what is
    computed in it must be read before that.

    Examples
    --------
    >>> one = Workspace()
    >>> first = one.take("tile", (2, 3), torch.float32)
    >>> first.shape, one.take("tile", (3,), torch.float32).data_ptr() == first.data_ptr()
    (torch.Size([2, 3]), True)
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype, torch.device], torch.Tensor] = {}
        self._pairs: dict[tuple[str, tuple[int, ...], torch.dtype], tuple[torch.Tensor, Array]] = {}

    def take(
        self,
        purpose: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device | None = None,
    ) -> torch.Tensor:
        """Return a contiguous tensor of undefined content, on the CPU by default."""
        count = torch.Size(shape).numel()
        device = torch.device("cpu") if device is None else device
        key = purpose, dtype, device
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < count:
            self._buffers.pop(key, None)  # the old one may go before the new one comes
            self._forget_pairs(purpose)
            with torch.inference_mode(False):  # a tensor of inference could not be written later
                buffer = torch.empty(count, dtype=dtype, device=device)
            self._buffers[key] = buffer
        return buffer[:count].view(shape)

    def take_pair(
        self, purpose: str, shape: tuple[int, ...], dtype: torch.dtype
    ) -> tuple[torch.Tensor, Array]:
        """Return a buffer on the CPU as a tensor and as an array, both made once for each shape."""
        found = self._pairs.get((purpose, shape, dtype))
        if found is None:
            with torch.inference_mode(False):
                tensor = self.take(purpose, shape, dtype)
            found = self._pairs[purpose, shape, dtype] = tensor, array_of(tensor)
        return found

    def _forget_pairs(self, purpose: str | None) -> None:
        self._pairs = {k: v for k, v in self._pairs.items() if purpose not in (None, k[0])}

    def forget(self, purpose: str | None = None) -> None:
        """Give this thread's buffers back: all, or those of a purpose."""
        self._forget_pairs(purpose)
        for key in list(self._buffers):
            if purpose in (None, key[0]):
                del self._buffers[key]


workspace = Workspace()


def empty_matrix(like: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Return an undefined matrix of the dtype and on the device of another tensor.

    Examples
    --------
    >>> empty_matrix(torch.ones(1, dtype=torch.bfloat16), 1024, 2048).shape
    torch.Size([1024, 2048])
    """
    nbytes = rows * columns * like.element_size()
    if nbytes < _SMALL_RESULT or like.device.type != "cpu":
        return like.new_empty(rows, columns)
    memory = torch.from_numpy(numpy.empty(nbytes + _ALIGNMENT, dtype=numpy.uint8))
    start = -memory.data_ptr() % _ALIGNMENT
    return memory[start : start + nbytes].view(like.dtype).view(rows, columns)


def save_inputs(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return tensors to keep, the large ones on a CPU as contiguous copies; without gradient.

    Examples
    --------
    >>> (kept,) = save_inputs([torch.ones(1 << 16)])
    >>> kept.sum()
    tensor(65536.)
    """
    return [_copy(x.detach()) if _is_large(x) else x.detach() for x in tensors]


def _is_large(x: torch.Tensor) -> bool:
    return x.device.type == "cpu" and x.numel() * x.element_size() >= _SMALL_INPUT


def _copy(x: torch.Tensor) -> torch.Tensor:
    nbytes = x.numel() * x.element_size()
    try:
        memory = mmap.mmap(-1, nbytes, **_PRIVATE)
    except OSError:
        raise MemoryError(f"can't allocate memory: {nbytes} bytes for a layer's input") from None
    return torch.frombuffer(memory, dtype=x.dtype).view(x.shape).copy_(x)


def keep_freed_memory(plentiful: bool) -> bool:
    """Let freed memory stay with the process, for its next tensors.

    By default glibc gives a block of more than 128 KiB back when it is freed, and the end of its
    heap, too; the kernel must then find and clear fresh pages for every tensor of every layer,
    which took a quarter of a step's CPU time. Kept in the heap, large blocks leave holes between
    them, a sixth to a third of what a step holds. Where memory is plentiful blocks of up to 32 MiB
    are kept; else those of up to 1 MiB, and a step takes a tenth longer. Returned is whether the C
    library is one that knows this.
    """
    libc = ctypes.CDLL(None) if sys.platform.startswith("linux") else None
    if libc is None or not hasattr(libc, "mallopt"):
        return False
    largest = _LARGEST_IN_HEAP[0 if plentiful else 1]
    settings = (_M_MMAP_THRESHOLD, largest), (_M_TRIM_THRESHOLD, _NEVER)
    return all([bool(libc.mallopt(*setting)) for setting in settings])
