"""One call of a decoder layer, as something that can be made again, and cut into rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.utils import _pytree as trees

from loraformat.errors import UnsupportedError

__all__ = ["LayerCall"]


@dataclass(frozen=True, slots=True)
class LayerCall:
    """One call of a layer: its arguments, flat, and which of them have a gradient."""

    leaves: list[Any]
    structure: Any
    differentiable: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, arguments: tuple[Any, ...], options: dict[str, Any]) -> LayerCall:
        """Record the arguments of a call."""
        leaves, structure = trees.tree_flatten((arguments, options))
        chosen = [i for i, x in enumerate(leaves) if torch.is_tensor(x) and x.requires_grad]
        return cls(leaves, structure, chosen)

    @property
    def hidden(self) -> int:
        """Position of the hidden states among the leaves, which come first; -1 if none are."""
        for position, leaf in enumerate(self.leaves):
            if torch.is_tensor(leaf) and leaf.dim() == 3 and leaf.is_floating_point():
                return position
        return -1

    @property
    def rows(self) -> int:
        """Rows of the batch."""
        return 1 if self.hidden < 0 else int(self.leaves[self.hidden].shape[0])

    @property
    def tokens(self) -> int:
        """Positions in the batch; 0 if it cannot be told."""
        return 0 if self.hidden < 0 else int(self.leaves[self.hidden].shape[:2].numel())

    def with_inputs(self, inputs: Sequence[torch.Tensor]) -> LayerCall:
        """Return the call with other tensors in place of the differentiable ones."""
        leaves = list(self.leaves)
        for position, tensor in zip(self.differentiable, inputs, strict=True):
            leaves[position] = tensor
        return replace(self, leaves=leaves)

    def groups(self, rows_at_once: int | None) -> Iterator[tuple[slice, LayerCall]]:
        """Cut the call into calls for some rows each."""
        rows = self.rows
        step = min(rows_at_once or rows, rows)
        for start in range(0, rows, step):
            part = slice(start, min(start + step, rows))
            if step == rows:
                yield part, self
                return
            leaves = [x[part] if _has_rows(x, rows) else x for x in self.leaves]
            yield part, replace(self, leaves=leaves)

    def run(self, function: Callable[..., Any]) -> Any:
        """Call a layer."""
        arguments, options = trees.tree_unflatten(self.leaves, self.structure)
        return function(*arguments, **options)


def _has_rows(leaf: Any, rows: int) -> bool:
    """Tell whether an argument has a part for each row; rows times heads cannot be cut."""
    if not torch.is_tensor(leaf) or leaf.dim() < 2:
        return False
    if leaf.dim() == 3 and leaf.shape[0] > rows and leaf.shape[0] % rows == 0:
        raise UnsupportedError(
            f"its layers take a tensor {list(leaf.shape)} for {rows} rows, which cannot be cut "
            "into groups of rows",
            hint="train without rows at once (layer-major)",
        )
    return bool(leaf.shape[0] == rows)
