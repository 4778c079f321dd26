"""New tensors for products, of memory that can be used again.

torch asks for aligned memory, and of a freed block glibc does not make an aligned one of the same
size: it wants a few bytes more, which small objects have taken by then. The heap would grow with
every layer. Plain memory, with room to align it in, fits where the last one was.
"""

from __future__ import annotations

import numpy
import torch

__all__ = ["fresh"]

_ALIGNMENT = 64
#: Smaller ones may lie anywhere (bytes).
_SMALL = 1 << 20


def fresh(like: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Return an undefined matrix of the dtype and on the device of another tensor.

    Examples
    --------
    >>> fresh(torch.ones(1, dtype=torch.bfloat16), 1024, 2048).shape
    torch.Size([1024, 2048])
    """
    nbytes = rows * columns * like.element_size()
    if nbytes < _SMALL or like.device.type != "cpu":
        return like.new_empty(rows, columns)
    memory = torch.from_numpy(numpy.empty(nbytes + _ALIGNMENT, dtype=numpy.uint8))
    start = -memory.data_ptr() % _ALIGNMENT
    return memory[start : start + nbytes].view(like.dtype).view(rows, columns)
