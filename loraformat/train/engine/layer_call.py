"""A recorded call of a decoder layer: it can be repeated exactly, and split into groups of rows.

To repeat a call, three things must be as they were: its arguments, the objects that it shares with
other layers (in which it may find keys and values that earlier layers put there, and puts some
itself, which on repetition are for nobody), and the states of torch's random generators.

Examples
--------
>>> state = rng_state([])
>>> first = torch.rand(3)
>>> with restored_rng_state(state):
...     again = torch.rand(3)
>>> torch.equal(first, again)
True
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import Enum
from types import FunctionType, MethodType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as trees

from loraformat.errors import UnsupportedError
from loraformat.train.engine.buffers import save_inputs

__all__ = ["LayerCall", "RngState", "restored_rng_state", "rng_state"]

_PLAIN = (
    type(None), bool, int, float, str, bytes, type, Enum, FunctionType, MethodType, torch.Tensor,
    torch.dtype, torch.device, torch.nn.Module,
)  # fmt: skip

#: Of the CPU, and of devices.
RngState = tuple[torch.Tensor, list[tuple[torch.device, torch.Tensor]]]


@dataclass(frozen=True, slots=True)
class LayerCall:
    """One call of a layer: its arguments, also flat, and which of them have a gradient."""

    arguments: tuple[Any, ...]
    options: dict[str, Any]
    leaves: list[Any]
    structure: Any
    differentiable: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, arguments: tuple[Any, ...], options: dict[str, Any]) -> LayerCall:
        """Record the arguments of a call."""
        leaves, structure = trees.tree_flatten((arguments, options))
        chosen = [i for i, x in enumerate(leaves) if torch.is_tensor(x) and x.requires_grad]
        return cls(arguments, options, leaves, structure, chosen)

    @property
    def hidden(self) -> int:
        """Position of the hidden states among the leaves, which come first; -1 if none are.

        They are (rows, positions, features), maybe several of that (Gemma 3n has four streams).
        """
        for position, leaf in enumerate(self.leaves):
            if torch.is_tensor(leaf) and leaf.dim() >= 3 and leaf.is_floating_point():
                return position
        return -1

    @property
    def rows(self) -> int:
        """Rows of the batch."""
        return 1 if self.hidden < 0 else int(self.leaves[self.hidden].shape[-3])

    @property
    def tokens(self) -> int:
        """Positions in the batch, of all streams; 0 if unknown."""
        return 0 if self.hidden < 0 else int(self.leaves[self.hidden].shape[:-1].numel())

    def with_gradient(self) -> LayerCall:
        """Return a call with at least one argument that has a gradient, even if it is not used."""
        if self.differentiable or self.hidden < 0:
            return self
        old = self.leaves[self.hidden]
        new = old.detach().requires_grad_()

        def changed(value: Any) -> Any:
            return new if value is old else value

        options = {name: changed(value) for name, value in self.options.items()}
        return LayerCall.of(tuple(map(changed, self.arguments)), options)

    def first_with_gradient(self) -> list[torch.Tensor]:
        """Return the hidden states, or another argument, if one has a gradient; at most one."""
        tensors = [self.leaves[i] for i in self.differentiable]
        if self.hidden in self.differentiable:
            tensors = [self.leaves[self.hidden]]
        return tensors[:1]

    def groups(self, rows_at_once: int | None) -> list[LayerCall]:
        """Cut the call into calls for some rows each.

        Raises
        ------
        UnsupportedError
            If an argument cannot be cut.
        """
        rows = self.rows
        step = min(rows_at_once or rows, rows)
        if step == rows:
            return [self]
        if self.leaves[self.hidden].dim() > 3:
            raise _not_cut(self.leaves[self.hidden], rows)
        cut = [x.split(step) if _has_rows(x, rows) else None for x in self.leaves]
        calls = []
        for number in range(-(-rows // step)):
            leaves = [
                whole if parts is None else parts[number]
                for whole, parts in zip(self.leaves, cut, strict=True)
            ]
            calls.append(LayerCall.of(*trees.tree_unflatten(leaves, self.structure)))
        return calls

    def run(self, function: Callable[..., Any]) -> Any:
        """Call a layer with the arguments as they are: what it writes in them others may read."""
        return function(*self.arguments, **self.options)

    def to_repeat(self) -> LayerCall:
        """Return the call as it is now, to be made again, whatever becomes of its arguments."""
        leaves: Sequence[Any] = list(map(_copy_shared_state, self.leaves))
        held = dict(zip(self.differentiable, save_inputs([leaves[i] for i in self.differentiable]),
                        strict=True))  # fmt: skip
        return replace(
            self, arguments=(), options={},
            leaves=[held.get(position, leaf) for position, leaf in enumerate(leaves)],
        )  # fmt: skip

    def repeated(self) -> LayerCall:
        """Return a call like the one that was held, for a graph of its own."""
        leaves = list(map(_copy_shared_state, self.leaves))
        for position in self.differentiable:
            leaves[position] = leaves[position].detach().requires_grad_()
        return LayerCall.of(*trees.tree_unflatten(leaves, self.structure))


def _has_rows(leaf: Any, rows: int) -> bool:
    """Tell whether an argument has a part for each row; rows times heads cannot be cut."""
    if not torch.is_tensor(leaf) or leaf.dim() < 2:
        return False
    if leaf.dim() == 3 and leaf.shape[0] > rows and leaf.shape[0] % rows == 0:
        raise _not_cut(leaf, rows)
    return bool(leaf.shape[0] == rows)


def _not_cut(leaf: torch.Tensor, rows: int) -> UnsupportedError:
    return UnsupportedError(
        f"its layers take a tensor {list(leaf.shape)} for {rows} rows, which cannot be cut "
        "into groups of rows",
        hint="train without rows at once (layer-major)",
    )


class _SameNumbers(TorchFunctionMode):
    """A tensor's copy is the same numbers, without what they were computed from."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.Tensor.__deepcopy__:
            return args[0].detach().requires_grad_(args[0].requires_grad)
        return func(*args, **(kwargs or {}))


def _copy_shared_state(value: Any) -> Any:
    """Return a copy that shares the numbers; what is no container, or cannot be copied, itself."""
    if isinstance(value, _PLAIN):
        return value
    try:
        with _SameNumbers():
            return copy.deepcopy(value)
    except Exception:  # an object of any class: a lock in it is enough
        return value


def rng_state(leaves: Sequence[Any]) -> RngState:
    """Return the state of the CPU's generator, and of those of devices on which tensors are."""
    devices = {leaf.device for leaf in leaves if torch.is_tensor(leaf) and leaf.is_cuda}
    return torch.get_rng_state(), [(d, torch.cuda.get_rng_state(d)) for d in devices]


@contextmanager
def restored_rng_state(state: RngState) -> Iterator[None]:
    """Draw the same random numbers again, and leave the generator as it was."""
    of_cpu, of_devices = state
    devices = [device for device, _ in of_devices]
    with torch.random.fork_rng(devices, device_type="cuda" if devices else "cpu"):
        torch.set_rng_state(of_cpu)
        for device, of_device in of_devices:
            torch.cuda.set_rng_state(of_device, device)
        yield
