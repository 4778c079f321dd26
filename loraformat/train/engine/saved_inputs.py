"""What a layer that is computed again keeps of its inputs: copies outside of the C library's heap.

They are what lives long in a step. In the heap they would lie between the short-lived tensors of
their layers and keep the holes around them from being used again: memory would grow with every
layer almost as if nothing were recomputed. In mappings of their own they leave the heap alone.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence

import torch

__all__ = ["hold"]

#: Smaller ones stay where they are (bytes).
_SMALL = mmap.PAGESIZE
#: Memory of this process, counted as such; by default Python's is shared with its children.
_PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if os.name == "posix" else {}


def hold(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return tensors to keep, the large ones on a CPU as copies; without gradient.

    Parameters
    ----------
    tensors : sequence of torch.Tensor

    Returns
    -------
    list of torch.Tensor
        Contiguous where they are copies; each gives its memory back when it is let go.

    Examples
    --------
    >>> (kept,) = hold([torch.ones(1 << 16)])
    >>> kept.sum()
    tensor(65536.)
    """
    return [_copy(x.detach()) if _is_large(x) else x.detach() for x in tensors]


def _is_large(x: torch.Tensor) -> bool:
    return x.device.type == "cpu" and x.numel() * x.element_size() >= _SMALL


def _copy(x: torch.Tensor) -> torch.Tensor:
    nbytes = x.numel() * x.element_size()
    try:
        memory = mmap.mmap(-1, nbytes, **_PRIVATE)
    except OSError:
        raise MemoryError(f"can't allocate memory: {nbytes} bytes for a layer's input") from None
    return torch.frombuffer(memory, dtype=x.dtype).view(x.shape).copy_(x)
