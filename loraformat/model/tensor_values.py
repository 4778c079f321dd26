"""Validation of tensor values."""

from __future__ import annotations

from pathlib import Path

from loraformat.errors import InputError, printable
from loraformat.tensors.arrays import Array, finite

__all__ = ["check_finite"]


def check_finite(
    values: Array, name: str, path: Path | None = None, *, error: type[InputError] = InputError
) -> None:
    """Refuse NaN and infinity.

    Parameters
    ----------
    values : array
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
    if not finite(values):
        raise error(
            f"tensor {printable(name)} holds NaN or infinity",
            path=path,
            hint="the file is damaged, or its training diverged: use an earlier checkpoint",
        )
