"""A torch tensor's numbers: their bytes, and whether all of them are finite."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from loraformat.errors import InputError, printable

if TYPE_CHECKING:
    import torch

__all__ = ["check_finite", "tensor_bytes"]


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    r"""Return a tensor's bytes, flat; the opposite of `loraformat.model.checkpoint.tensor_view`.

    Examples
    --------
    >>> import torch
    >>> bytes(tensor_bytes(torch.tensor([1, 256], dtype=torch.int16)))
    b'\x01\x00\x00\x01'
    """
    import torch

    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def check_finite(
    values: torch.Tensor,
    name: str,
    path: Path | None = None,
    *,
    error: type[InputError] = InputError,
) -> None:
    """Refuse NaN and infinity.

    Parameters
    ----------
    values : torch.Tensor
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
    if not bool(values.isfinite().all()):
        raise error(
            f"tensor {printable(name)} holds NaN or infinity",
            path=path,
            hint="the file is damaged, or its training diverged: use an earlier checkpoint",
        )
