"""Copies of objects that layers share, with the same tensors in them.

A decoder layer may be given an object in which it finds what earlier layers put there, keys and
values, say, and puts something itself. When it is computed again it must find what it found, and
what it puts there then is for nobody.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from enum import Enum
from types import FunctionType, MethodType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

__all__ = ["copied"]

_PLAIN = (
    type(None), bool, int, float, str, bytes, type, Enum, FunctionType, MethodType, torch.Tensor,
    torch.dtype, torch.device, torch.nn.Module,
)  # fmt: skip


class _SameNumbers(TorchFunctionMode):
    """A tensor's copy is the same numbers, without what they were computed from."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.Tensor.__deepcopy__:
            return args[0].detach().requires_grad_(args[0].requires_grad)
        return func(*args, **(kwargs or {}))


def copied(value: Any) -> Any:
    """Return an object of its own with the same numbers; what is no container, itself.

    Parameters
    ----------
    value : Any
        An argument of a layer. What cannot be copied is returned as it is.

    Examples
    --------
    >>> from collections import UserDict
    >>> shared = UserDict(keys=torch.ones(2))
    >>> other = copied(shared)
    >>> other["more"] = 1
    >>> sorted(shared), other["keys"].data_ptr() == shared["keys"].data_ptr()
    (['keys'], True)
    """
    if isinstance(value, _PLAIN):
        return value
    try:
        with _SameNumbers():
            return copy.deepcopy(value)
    except Exception:  # an object of any class: a lock in it is enough
        return value
