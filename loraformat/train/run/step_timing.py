"""How long a step will take, measured on this machine before the run.

A batch is timed whole where that takes seconds. Else one decoder layer's linears are: they are
where the time goes. Every layer is computed twice forward (once to keep its input, once anew)
and once backward.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from loraformat.train.batch import Batch

__all__ = ["StepTime", "time_of"]

#: A whole batch is timed if it is expected to take no longer (seconds).
_PATIENCE = 15.0


@dataclass(frozen=True, slots=True)
class StepTime:
    """What was measured.

    Attributes
    ----------
    seconds : float
        Of one micro-batch, forward and backward.
    tokens : int
        In it.
    whole : bool
        Whether the batch was timed whole, or is reckoned from one layer.
    """

    seconds: float
    tokens: int
    whole: bool


def time_of(model: Any, batch: Batch, layers: int) -> StepTime:
    """Time one micro-batch; gradients and statistics are as before afterwards.

    Parameters
    ----------
    model : TrainableModel
    batch : Batch
        On the model's device.
    layers : int
        Decoder layers.
    """
    tokens = batch.input_ids.numel()
    reckoned = _layer_seconds(model, tokens) * layers
    if reckoned > _PATIENCE:
        return StepTime(reckoned, tokens, whole=False)
    kept = {name: value.clone() for name, value in model.extra_state().items()}
    was = model.training
    model.train()
    try:
        seconds = min(_clock(lambda: model.loss(batch).backward()) for _ in range(2))
    finally:
        model.train(was)
        model.load_extra_state(kept)
        for parameter in model.trainable().values():
            parameter.grad = None
    return StepTime(seconds, tokens, whole=True)


def _layer_seconds(model: Any, tokens: int) -> float:
    """Time the linears of the first layer: twice forward, once backward."""
    total = 0.0
    for module in model.modules():
        if getattr(module, "layer", None) != 0 or not hasattr(module, "in_features"):
            continue
        x = torch.zeros(tokens, module.in_features, device=module.device, requires_grad=True)
        y = module(x)
        gradient = torch.ones_like(y)
        total += 2 * _clock(lambda module=module, x=x: module(x))  # type: ignore[misc]
        total += _clock(lambda y=y, gradient=gradient: y.backward(gradient))  # type: ignore[misc]
    for parameter in model.trainable().values():
        parameter.grad = None
    return total


def _clock(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begun
