"""Activation statistics beside an adapter: ``activation_statistics.safetensors``.

For each module ``NAME.second_moment``, E[z zᵀ] of z = A x, in float32: (rank, rank), or
(experts, rank, rank). PEFT does not look at the file; reducing the rank does. Its form is
described in ``spec/loraformat-1.1.md``, section 11.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from loraformat.errors import InputError, nearest, printable
from loraformat.model.adapter import STATISTICS_NAME, LoraDelta
from loraformat.model.checkpoint import DenseTensor
from loraformat.tensors.arrays import array_view, finite
from loraformat.tensors.mapped import MappedFile

__all__ = ["SUFFIX", "read_moments"]

SUFFIX = ".second_moment"

#: Largest difference of a moment and its transpose, over its largest element.
_ASYMMETRY = 1e-3


def read_moments(file: MappedFile, deltas: Mapping[str, LoraDelta]) -> dict[str, DenseTensor]:
    """Return second moments by module's stored name; values are checked when they are loaded."""
    found = {}
    for name, entry in file.header.entries.items():
        module = name.removesuffix(SUFFIX)
        if module == name or module not in deltas:
            raise InputError(
                f"tensor {printable(name)} is the second moment of no module"
                + nearest(module, deltas),
                path=file.path,
                hint=f"remove {STATISTICS_NAME}, or the adapter that it is not of",
            )
        delta = deltas[module]
        wanted = (*delta.a.shape[:-2], delta.rank, delta.rank)
        if entry.dtype != "F32" or entry.shape != wanted:
            raise InputError(
                f"tensor {printable(name)} is {entry.dtype} of shape {list(entry.shape)}, wanted "
                f"F32 of {list(wanted)}",
                path=file.path,
            )
        load = partial(_load, file, name, delta.rank)
        found[module] = DenseTensor(name, "F32", wanted, load, file.releaser(name))
    return found


def _load(file: MappedFile, name: str, rank: int) -> memoryview:
    data = file.view(name)
    values = array_view(data, "F32", (len(data) // (4 * rank * rank), rank, rank))
    largest = abs(values).max((1, 2), keepdims=True)
    if not (
        finite(values)
        and (abs(values - values.mT) <= _ASYMMETRY * largest).all()
        and (values.diagonal(axis1=1, axis2=2) >= 0).all()
    ):
        raise InputError(
            f"tensor {printable(name)} is not a valid second moment: it is not finite, not "
            "symmetric, or has a negative diagonal",
            path=file.path,
            hint=f"remove {STATISTICS_NAME}: it only makes reduce better",
        )
    return data
