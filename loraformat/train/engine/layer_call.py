"""One call of a decoder layer, as something that can be made again, and cut into rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.utils import _pytree as trees

from loraformat.errors import UnsupportedError
from loraformat.train.engine.saved_inputs import hold
from loraformat.train.engine.shared_state import copied

__all__ = ["LayerCall"]


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
        """Positions in the batch, of all streams; 0 if it cannot be told."""
        return 0 if self.hidden < 0 else int(self.leaves[self.hidden].shape[:-1].numel())

    def with_gradient(self) -> LayerCall:
        """Return a call that has an argument with a gradient, be it one that nobody wants."""
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
        leaves: Sequence[Any] = list(map(copied, self.leaves))
        held = dict(zip(self.differentiable, hold([leaves[i] for i in self.differentiable]),
                        strict=True))  # fmt: skip
        return replace(
            self, arguments=(), options={},
            leaves=[held.get(position, leaf) for position, leaf in enumerate(leaves)],
        )  # fmt: skip

    def repeated(self) -> LayerCall:
        """Return a call like the one that was held, for a graph of its own."""
        leaves = list(map(copied, self.leaves))
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
