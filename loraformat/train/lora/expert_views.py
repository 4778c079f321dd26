"""The factors of each expert as views of the stack, made once.

Taking one matrix out of a stack of E makes a gradient of the whole stack, E times over: with 128
experts that costs more than all the rest. ``unbind`` makes all views at once, and its backward
pass gathers their gradients once. It keeps nothing but shapes, so that the views serve every
pass until the stack is another tensor, or an optimizer has written to it.
"""

from __future__ import annotations

import torch

__all__ = ["ExpertViews"]

_Views = tuple[torch.Tensor, ...]


class ExpertViews:
    """Remembers views of two stacks.

    Examples
    --------
    >>> a, b = torch.nn.Parameter(torch.ones(3, 1, 2)), torch.nn.Parameter(torch.ones(3, 2, 1))
    >>> views = ExpertViews()
    >>> views.of(a, b)[0][2].sum().backward()
    >>> a.grad.sum((1, 2))
    tensor([0., 0., 2.])
    >>> views.of(a, b)[0][0] is views.of(a, b)[0][0]
    True
    """

    def __init__(self) -> None:
        self._key: tuple[object, ...] | None = None
        self._views: tuple[_Views, _Views] = ((), ())

    def of(self, a: torch.Tensor, b: torch.Tensor) -> tuple[_Views, _Views]:
        """Return the matrices of both stacks, expert by expert."""
        stacks = (a, b)
        key = (
            torch.is_grad_enabled(),
            *((id(s), s.data_ptr(), s._version, s.device, s.requires_grad) for s in stacks),
        )
        if key != self._key:
            self._key, self._views = key, (a.unbind(0), b.unbind(0))
        return self._views

    def __deepcopy__(self, memo: object) -> ExpertViews:
        return ExpertViews()  # views belong to one stack

    def __reduce__(self) -> tuple[type[ExpertViews], tuple[()]]:
        return ExpertViews, ()
