"""The numbers of a tensor, in numpy or torch: their bytes, and whether all of them are finite."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy

from loraformat.errors import InputError, printable
from loraformat.tensors.arrays import Array, array_bytes, finite

if TYPE_CHECKING:
    import torch

__all__ = ["check_finite", "tensor_bytes"]


def tensor_bytes(tensor: Array | torch.Tensor) -> memoryview:
    r"""Return a tensor's bytes, flat; the opposite of `loraformat.model.checkpoint.tensor_view`.

    Examples
    --------
    >>> import torch
    >>> bytes(tensor_bytes(torch.tensor([1, 256], dtype=torch.int16)))
    b'\x01\x00\x00\x01'
    """
    if isinstance(tensor, numpy.ndarray):
        return array_bytes(tensor)
    import torch

    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def check_finite(
    values: Array | torch.Tensor,
    name: str,
    path: Path | None = None,
    *,
    error: type[InputError] = InputError,
) -> None:
    """Refuse NaN and infinity.

    Parameters
    ----------
    values : array or torch.Tensor
    name : str
        Of the tensor.
    path : Path, optional
        Its file.
    error : type
        What is raised.

    Raises
    ------
    InputError
    """
    held = finite(values) if isinstance(values, numpy.ndarray) else bool(values.isfinite().all())
    if not held:
        raise error(
            f"tensor {printable(name)} holds NaN or infinity",
            path=path,
            hint="the file is damaged, or its training diverged: use an earlier checkpoint",
        )
