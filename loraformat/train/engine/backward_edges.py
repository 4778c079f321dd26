"""Marks in a graph that tell when a backward pass enters a layer and when it leaves it.

For layers that keep their activations: their forward is transformers' own, and it is at these two
places, not in hooks, that their weights are brought into memory and let go again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["mark"]


def mark(tensor: torch.Tensor, when_passed: Callable[[], None]) -> torch.Tensor:
    """Return a view of a tensor; `when_passed` is called when its gradient comes by.

    Examples
    --------
    >>> x = torch.ones(2, requires_grad=True)
    >>> mark(x, lambda: print("here")).sum().backward()
    here
    """
    result: torch.Tensor = _Mark.apply(tensor, when_passed)  # type: ignore[no-untyped-call]
    return result


class _Mark(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, when_passed: Callable[[], None]) -> torch.Tensor:
        ctx.when_passed = when_passed
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        ctx.when_passed()
        return gradients[0], None
