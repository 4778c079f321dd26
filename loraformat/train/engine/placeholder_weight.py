"""What stands where a module's weight would be: its dtype and shape, and no numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch

from loraformat.errors import UnsupportedError, printable

__all__ = ["AbsentWeight", "WeightWanted"]


class WeightWanted(UnsupportedError, AttributeError):
    """A class looks at a weight that is not there.

    Parameters
    ----------
    module : str
        Whose weight.

    Attributes
    ----------
    module : str
    """

    def __init__(self, module: str) -> None:
        self.module = module
        super().__init__(
            f"this model's class computes with the weight of {printable(module)} outside of its "
            "module, and training leaves that on disk"
        )


class AbsentWeight:
    """Answers what models ask of a weight, and refuses to be computed with.

    Some classes look at a linear's dtype before they call it. A few, Mamba's among them, multiply
    by its weight themselves; that must fail, and not give just any number.

    Parameters
    ----------
    name : str
        Of the module.
    shape : tuple of int
    device : torch.device
    dtype : torch.dtype
        In which the module computes.

    Examples
    --------
    >>> weight = AbsentWeight("lm_head", (2, 3), torch.device("cpu"))
    >>> weight.dtype, weight.size(0), weight.numel()
    (torch.float32, 2, 6)
    >>> torch.ones(1, 3) @ weight
    Traceback (most recent call last):
    ...
    loraformat.train.engine.placeholder_weight.WeightWanted: this model's class computes ...
    """

    requires_grad = False
    is_meta = False

    def __init__(
        self,
        name: str,
        shape: tuple[int, ...],
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.name, self.shape, self.device = name, torch.Size(shape), device
        self.dtype = dtype
        self.ndim = len(shape)

    def size(self, dim: int | None = None) -> Any:
        """Return the shape, or one of its numbers."""
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        """Return the number of elements."""
        return self.shape.numel()

    def dim(self) -> int:
        """Return the number of dimensions."""
        return self.ndim

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> NoReturn:
        every = [*args, *(kwargs or {}).values()]
        raise WeightWanted(next((x.name for x in every if isinstance(x, AbsentWeight)), "a module"))

    def __getitem__(self, index: Any) -> torch.Tensor:
        raise WeightWanted(self.name)

    def __getattr__(self, attribute: str) -> NoReturn:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        raise WeightWanted(self.name)
