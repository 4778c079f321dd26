"""Saved tensors of a checkpointed computation, which are recomputed when autograd asks for them.

The graph is autograd's own, made once: a tensor that a layer leaves anywhere for another layer has
its gradient, whichever way it gets there. Only the numbers in the graph are not kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from loraformat.errors import UnsupportedError

__all__ = ["Forgotten", "capturing"]


class Forgotten:
    """Stands for the tensors that one computation saved.

    Parameters
    ----------
    again : callable
        Makes the computation again and returns what it saved, in the same order.

    Examples
    --------
    >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> def again():
    ...     with torch.enable_grad(), capturing() as saved:
    ...         x * x
    ...     return saved
    >>> forgotten = Forgotten(again)
    >>> with forgotten.saving():
    ...     y = x * x
    >>> y.sum().backward()
    >>> x.grad
    tensor([2., 4.])
    """

    def __init__(self, again: Callable[[], Sequence[torch.Tensor]]) -> None:
        self._again = again
        self._count = 0
        self._values: dict[int, torch.Tensor] = {}

    def saving(self) -> AbstractContextManager[Any]:
        """Forget what is saved for the backward pass while this lasts."""
        return torch.autograd.graph.saved_tensors_hooks(self._save, self._recall)

    def _save(self, tensor: torch.Tensor) -> Any:
        if isinstance(tensor, torch.nn.Parameter):
            return tensor
        self._count += 1
        return self._count - 1

    def _recall(self, saved: Any) -> torch.Tensor:
        if torch.is_tensor(saved):
            return saved
        if saved not in self._values:
            found = self._again()
            if len(found) != self._count:
                raise UnsupportedError(
                    f"a layer kept {self._count} tensors for its gradients, and when it was "
                    f"computed again {len(found)}: its class does not compute the same twice",
                    hint="give it the memory not to compute again: --activation-memory",
                )
            self._values = dict(enumerate(found))
        return self._values.pop(saved)

    def clear(self) -> None:
        """Let go what was computed again, and not wanted."""
        self._values.clear()


@contextmanager
def capturing() -> Iterator[list[torch.Tensor]]:
    """Collect what is saved for a backward pass that will not be: all tensors but parameters.

    The graph itself holds none of them, for as long as this is over and the list is gone.
    """
    found: list[torch.Tensor] = []

    def save(tensor: torch.Tensor) -> Any:
        if isinstance(tensor, torch.nn.Parameter):
            return tensor
        found.append(tensor.detach())
        return len(found) - 1

    def look(saved: Any) -> torch.Tensor:
        return saved if torch.is_tensor(saved) else found[saved]

    with torch.autograd.graph.saved_tensors_hooks(save, look):
        yield found
