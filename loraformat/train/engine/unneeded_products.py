"""Products that the backward pass of a recomputed layer does not need, and so need not be computed.

A layer that is recomputed for its gradients gives results that nobody reads. Where its last product
is only added to the result, as that of an MLP is to the residual stream, its value is not needed
either: its gradient is that of the sum, and its own backward pass needs its input. That is one
product in seven, and the largest of a layer.

Whether that is so is not read from a class's source, it is tried: the layers of a class are
recomputed with NaN in place of that product, and it is left out if all gradients are the same bits.
A layer with forward hooks is computed as a whole, since these may read anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

import torch

from loraformat.train.engine.matrix import Matrix

__all__ = [
    "find_unneeded_products",
    "has_forward_hooks",
    "is_left_out",
    "last_products",
    "leaving_out",
]


#: Of each thread its own.
_left_out: ContextVar[frozenset[Matrix]] = ContextVar("left_out", default=frozenset())


def is_left_out(matrix: Matrix) -> bool:
    """Tell whether the product with a matrix need not be computed now, on this thread."""
    return matrix in _left_out.get()


@contextmanager
def leaving_out(matrices: Iterable[Matrix]) -> Iterator[None]:
    """Leave out the products with some matrices, on this thread, while this lasts."""
    outer = _left_out.set(frozenset(matrices))
    try:
        yield
    finally:
        _left_out.reset(outer)


def has_forward_hooks(layer: torch.nn.Module) -> bool:
    """Tell whether forward hooks see what the modules in a layer compute.

    Its own hooks are called with the result of the forward pass, and not in the backward pass.

    Examples
    --------
    >>> layer = torch.nn.Sequential(torch.nn.Tanh())
    >>> handle = layer[0].register_forward_hook(lambda *_: None)
    >>> has_forward_hooks(layer)
    True
    """
    everywhere = torch.nn.modules.module
    if everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks:
        return True
    inside = (module for module in layer.modules() if module is not layer)
    return any(module._forward_hooks or module._forward_pre_hooks for module in inside)


@contextmanager
def last_products(
    layers: Sequence[torch.nn.Module], kind: type[torch.nn.Module]
) -> Iterator[dict[int, str]]:
    """Record the name in its layer of the linear that each layer multiplies by last.

    The layers must be computed once while this lasts. The mapping is filled at the end; a layer is
    missing if it has no linear, or multiplies by that one more than once.
    """
    found: dict[int, str] = {}
    calls: list[list[str]] = [[] for _ in layers]
    with ExitStack() as hooks:
        for number, layer in enumerate(layers):
            for name, module in layer.named_modules():
                if isinstance(module, kind):

                    def record(*_: Any, number: int = number, name: str = name) -> None:
                        calls[number].append(name)

                    hooks.callback(module.register_forward_hook(record).remove)
        yield found
    for number, names in enumerate(calls):
        if names and names.count(names[-1]) == 1:
            found[number] = names[-1]


def find_unneeded_products(
    layers: Sequence[torch.nn.Module],
    candidates: Mapping[int, str],
    gradients: Callable[[Mapping[int, str]], Sequence[torch.Tensor | None]],
) -> dict[int, str]:
    """Find the products that can be left out, class by class.

    `candidates` are as `last_products` yields them. ``gradients(left_out)`` recomputes all layers
    without some products, and returns all gradients; always of the same input, and with the same
    random numbers. Returned are those candidates without which all gradients are the same bits.
    """
    groups: dict[tuple[type[torch.nn.Module], str], dict[int, str]] = {}
    for number, name in candidates.items():
        groups.setdefault((type(layers[number]), name), {})[number] = name
    if not groups:
        return {}
    wanted = gradients({})
    found: dict[int, str] = {}
    for group in groups.values():
        try:
            same = all(
                before is now if before is None or now is None else torch.equal(before, now)
                for before, now in zip(wanted, gradients(group), strict=True)
            )
        except Exception:  # a class of anybody's may refuse NaN
            same = False
        if same:
            found |= group
    return found
