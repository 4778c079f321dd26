"""Putting a model on a device: its small parts for good, as many layers as fit, the rest by turns.

Nothing here has been run on a GPU yet; its parts that do not depend on one are tested on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from loraformat.train.engine.device import DeviceMatrix
from loraformat.train.engine.experts import ExpertStack
from loraformat.train.engine.linear import FrozenLinear
from loraformat.train.engine.matrix import DenseMatrix, Matrix, NF4Matrix
from loraformat.train.engine.stored_weights import StoredWeights

__all__ = ["place_on"]

#: Share of the free device memory that the base may take if nobody says how much.
_SHARE = 0.6


def place_on(
    model: Any,
    used: Mapping[str, Sequence[str]],
    weights: StoredWeights,
    device: torch.device,
    budget: int | None,
) -> set[str]:
    """Let a model compute on a device.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Assembled; its embedding stays where it is, only its rows travel.
    used : mapping of str to sequence of str
        The tensors that its modules read.
    weights : StoredWeights
    device : torch.device
    budget : int or None
        Bytes that the base may take on the device; None for a share of what is free.

    Returns
    -------
    set of str
        Modules whose weights are on the device for good.
    """
    left = _free(device) if budget is None else budget
    model.to(device)
    resident = set()
    for name, module in _frozen(model):
        size = sum(end - begin for one in used[name] for _, begin, end in weights.spans(one))
        stays = size <= left
        if stays:
            resident.add(name)
            left -= size
        module.device = device
        if isinstance(module, FrozenLinear):
            module.matrix = _placed(module.matrix, device, stays)
        else:
            module.experts = [
                [_placed(m, device, stays) for m in parts] for parts in module.experts
            ]
    return resident


def _frozen(model: Any) -> Iterator[tuple[str, FrozenLinear | ExpertStack]]:
    for name, module in model.named_modules():
        if isinstance(module, FrozenLinear | ExpertStack):
            yield name, module


def _placed(matrix: Matrix, device: torch.device, resident: bool) -> Matrix:
    assert isinstance(matrix, NF4Matrix | DenseMatrix)
    return DeviceMatrix(matrix, device, resident=resident)


def _free(device: torch.device) -> int:
    free, _ = torch.cuda.mem_get_info(device)
    return int(free * _SHARE)
