"""Products that the backward pass of a recomputed layer does not need, and so need not be computed.

A layer that is recomputed for its gradients gives results that nobody reads. Where a product is
only added to the result, as the last of an MLP is to the residual stream, its value is not needed
either: its gradient is that of the sum, and its own backward pass needs its input. That is one
product in seven, and the largest of a layer.

Which products these are is seen in the graph. They are guessed first, to be what they were in
this layer the last time, or in the layer before; and the graph that comes of it is looked at.
So it is known what reads values as far as it has gradients; where there are none, a product may be
multiplied by a plain number and by nothing else. A layer with forward hooks is computed as a
whole, since these may read anything.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from loraformat.training.engine.matrix import Matrix

__all__ = ["Recording", "UnreadProducts", "has_forward_hooks", "leave_out"]

#: Nodes of autograd whose backward pass reads no value.
_TRANSPARENT = frozenset(
    f"{name}Backward0" for name in ("Add", "Alias", "Clone", "ReshapeAlias", "UnsafeView", "View")
)


class Recording:
    """The products of one computation of a layer, in their order.

    Parameters
    ----------
    matrices : frozenset of Matrix or None
        Products with these are left out; None where that is not known.
    numbers : frozenset of int
        Then those of these numbers.
    """

    def __init__(
        self,
        matrices: frozenset[Matrix] | None = frozenset(),
        numbers: frozenset[int] = frozenset(),
    ) -> None:
        self._matrices, self._numbers = matrices, numbers
        self.products: list[Matrix] = []
        self.left_out: set[int] = set()

    def add(self, matrix: Matrix) -> int:
        """Take a product down; returns its number."""
        number = len(self.products)
        self.products.append(matrix)
        guess = number in self._numbers if self._matrices is None else matrix in self._matrices
        if guess:
            self.left_out.add(number)
        return number


class _Current(threading.local):
    recording: Recording | None = None


_current = _Current()


def leave_out(ctx: Any, matrix: Matrix) -> bool:
    """Tell whether a product is to be left out, and mark its node in the graph.

    Parameters
    ----------
    ctx : Any
        Of the autograd function.
    matrix : Matrix
    """
    recording = _current.recording
    if recording is None:
        return False
    number = recording.add(matrix)
    ctx.product = recording, number
    return number in recording.left_out


def has_forward_hooks(layer: torch.nn.Module) -> bool:
    """Tell whether something looks at what the modules in a layer compute.

    Its own hooks are called with what it has computed for good, and not in the backward pass.

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


class UnreadProducts:
    """What is known of the layers of a model."""

    def __init__(self) -> None:
        self._of_layer: dict[int, frozenset[Matrix]] = {}
        self._numbers: frozenset[int] = frozenset()
        self._read: set[Matrix] = set()  # some time, what is multiplied by these

    @contextmanager
    def left_out(self, layer: int, *, guess: bool = True) -> Iterator[Recording]:
        """Leave out a layer's unread products, as far as they are known, while this lasts.

        Parameters
        ----------
        layer : int
        guess : bool
            Else none is left out.
        """
        known = self._of_layer.get(layer)
        recording = Recording(known, self._numbers) if guess else Recording()
        outer = _current.recording
        try:
            _current.recording = recording
            yield recording
        finally:
            _current.recording = outer

    def were_unread(self, layer: int, outputs: Sequence[Any], recording: Recording) -> bool:
        """Tell whether what was left out is read by nothing; learn what is not.

        Parameters
        ----------
        layer : int
        outputs : sequence
            What was computed meanwhile, with a graph.
        recording : Recording
        """
        self._numbers = unread = _unread(outputs, recording)
        self._read.update(m for n, m in enumerate(recording.products) if n not in unread)
        self._of_layer[layer] = frozenset(recording.products[n] for n in unread) - self._read
        return recording.left_out <= unread


def _unread(outputs: Sequence[Any], recording: Recording) -> frozenset[int]:
    """Return the numbers of the products that nothing reads but sums that are outputs."""
    roots = [x.grad_fn for x in outputs if torch.is_tensor(x) and x.grad_fn is not None]
    uses, ahead = Counter(roots), list(set(roots))
    while ahead:
        for behind in _behind(ahead.pop()):
            if behind not in uses:
                ahead.append(behind)
            uses[behind] += 1
    idle, found = Counter(roots), set()
    ahead = [node for node in idle if idle[node] == uses[node]]
    while ahead:
        node = ahead.pop()
        of, number = getattr(node, "product", (None, -1))
        if of is recording:
            found.add(number)
        for behind in _not_read(node):
            idle[behind] += 1
            if idle[behind] == uses[behind]:
                ahead.append(behind)
    return frozenset(found)


def _not_read(node: Any) -> list[Any]:
    """Return what a node's backward pass hands its gradient on to without having kept its value."""
    if node.name() in _TRANSPARENT:
        return _behind(node)
    if node.name() == "MulBackward0" and node._saved_self is None:
        number = _is_number(node._saved_other, node._input_metadata[0].dtype)
        return [node.next_functions[0][0]] if number else []
    return []


def _is_number(factor: torch.Tensor, product: torch.dtype) -> bool:
    """Tell whether a factor without gradient is a number of the program's text, as Granite's is.

    Any tensor may be made of the value that is not there, by a comparison even. A Python number
    is a float64 without dimensions; one that was computed of the value would be NaN, or zero.
    """
    if factor.dim() != 0 or factor.dtype != torch.float64 or product == torch.float64:
        return False
    return bool(torch.isfinite(factor)) and bool(factor != 0)


def _behind(node: Any) -> list[Any]:
    return [behind for behind, _ in node.next_functions if behind is not None]
