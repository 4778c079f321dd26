"""Conversion between numpy arrays and torch tensors, sharing memory.

Neither library converts the other's bfloat16 or 8-bit floats; their bits are passed instead.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from loraformat.tensors.arrays import Array, dtype_name, numpy_dtype
from loraformat.tensors.dtypes import ITEM_BYTES, TORCH_NAMES, torch_dtype

if TYPE_CHECKING:
    import torch

__all__ = ["array_of", "tensor_of"]

_BITS = {1: "U8", 2: "I16", 4: "I32", 8: "I64"}
_SAFETENSORS_NAMES = {torch_name: name for name, torch_name in TORCH_NAMES.items()}


def tensor_of(array: Array) -> torch.Tensor:
    """Return an array as a torch tensor on the same memory, for reading if the array is.

    Examples
    --------
    >>> import numpy
    >>> tensor_of(numpy.zeros(2, numpy_dtype("BF16")))
    tensor([0., 0.], dtype=torch.bfloat16)
    """
    import torch

    name = dtype_name(array.dtype)
    bits = array.view(numpy_dtype(_BITS[ITEM_BYTES[name]])) if name != "C64" else array
    with warnings.catch_warnings():
        # torch warns that the bytes are read-only; nothing here writes to them.
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(bits).view(torch_dtype(name))


def array_of(tensor: torch.Tensor) -> Array:
    """Return a tensor on the CPU as a numpy array on the same memory.

    Examples
    --------
    >>> import torch
    >>> array_of(torch.zeros(2, dtype=torch.bfloat16)).dtype
    dtype(bfloat16)
    """
    name = _SAFETENSORS_NAMES[str(tensor.dtype).removeprefix("torch.")]
    tensor = tensor.detach()
    if name == "C64":
        return tensor.numpy()
    bits: Array = tensor.view(torch_dtype(_BITS[ITEM_BYTES[name]])).numpy()
    return bits.view(numpy_dtype(name))
