"""The sum of negative log-likelihoods, without the logits of all tokens at once.

    L = Σ_t (log Σ_v exp z_tv − z_t,y_t),   dL/dz_tv = softmax(z_t)_v − [v = y_t]

A few tokens at a time, the head goes over its vocabulary tile by tile into a reused buffer; the
gradient of the hidden states is computed at once and kept instead of the logits. All in float32,
the sum over tokens in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from loraformat.train.engine.head_rule import HeadRule
from loraformat.train.engine.linear import FrozenLinear
from loraformat.train.engine.product import multiply, multiply_transposed
from loraformat.train.engine.workspace import workspace

__all__ = ["frozen_head_loss", "own_head_loss"]

#: Logits that are held at once: 64 MB of float32.
_LOGITS = 1 << 24
#: Copies of them that autograd holds where the head is trained.
_COPIES = 4
_COLUMNS = 1 << 13


def frozen_head_loss(
    hidden: torch.Tensor, targets: torch.Tensor, head: FrozenLinear, rule: HeadRule
) -> torch.Tensor:
    """Return the loss of a head that has no branch.

    Parameters
    ----------
    hidden : torch.Tensor
        (tokens, hidden size), float32.
    targets : torch.Tensor
        int64 (tokens,).
    head : FrozenLinear
    rule : HeadRule

    Returns
    -------
    torch.Tensor
        float32 scalar.

    Examples
    --------
    >>> from loraformat.train.engine.matrix import DenseMatrix
    >>> head = FrozenLinear(DenseMatrix(torch.zeros(4, 2)))
    >>> frozen_head_loss(torch.ones(3, 2), torch.tensor([0, 1, 2]), head, HeadRule())
    tensor(4.1589)
    """
    result: torch.Tensor = _FrozenHeadLoss.apply(  # type: ignore[no-untyped-call]
        hidden, targets, head, rule
    )
    return result


class _FrozenHeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, targets: torch.Tensor, head: FrozenLinear, rule: HeadRule
    ) -> torch.Tensor:
        wanted = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden) if wanted else hidden.new_empty(0)
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        step = max(1, _LOGITS // head.out_features)
        for start in range(0, len(hidden), step):
            part = slice(start, start + step)
            loss, slope = _chunk(hidden[part], targets[part], head, rule, wanted)
            total += loss
            if slope is not None:
                multiplied = multiply_transposed(slope, head.matrix, head.dtype)
                gradient[part] = multiplied.mul_(rule.before)
        # With a large vocabulary it would be the largest of all buffers, idle until the next step.
        workspace.forget("logits")
        ctx.save_for_backward(gradient)
        return total.to(hidden.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, factor: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * factor, None, None, None


def _chunk(
    hidden: torch.Tensor,
    targets: torch.Tensor,
    head: FrozenLinear,
    rule: HeadRule,
    wanted: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return some tokens' loss, and its slope in what the head returns."""
    x = hidden if rule.before == 1 else hidden * rule.before
    out = workspace.take("logits", (len(x), head.out_features), x.dtype, x.device)
    z = multiply(x, head.matrix, head.dtype, out=out)
    if head.bias is not None:
        z += head.bias
    y = rule.apply_(z)
    chosen = y.gather(1, targets[:, None])
    largest = y.amax(1, keepdim=True)
    total = torch.zeros_like(largest)
    for columns in torch.split(y, _COLUMNS, 1):
        total += (columns - largest).exp_().sum(1, keepdim=True)
    normalizer = largest + total.log()
    loss = (normalizer - chosen).sum(dtype=torch.float64)
    if not wanted:
        return loss, None
    at_target = _slope(chosen, rule)
    for columns in torch.split(y, _COLUMNS, 1):
        columns.copy_((columns - normalizer).exp_().mul_(_slope(columns, rule)))
    return loss, y.scatter_add_(1, targets[:, None], -at_target)


def _slope(y: torch.Tensor, rule: HeadRule) -> torch.Tensor:
    """Return dy/dz of the rule, of logits that it gave."""
    if rule.cap is None:
        return torch.full_like(y[:, :1], rule.scale)
    return (1 - (y / rule.cap).square_()).mul_(rule.scale)


def own_head_loss(
    hidden: torch.Tensor,
    targets: torch.Tensor,
    logits: Callable[[torch.Tensor], torch.Tensor],
    vocabulary: int,
    trained: Sequence[torch.Tensor],
) -> torch.Tensor:
    """Return the loss of a head that is trained itself, or that no rule describes.

    Parameters
    ----------
    hidden : torch.Tensor
        (tokens, hidden size).
    targets : torch.Tensor
        int64 (tokens,).
    logits : callable
        Makes the logits of some hidden states, differentiably.
    vocabulary : int
    trained : sequence of torch.Tensor
        What of the head is trained.

    Returns
    -------
    torch.Tensor
        float32 scalar.
    """
    result: torch.Tensor = _OwnHeadLoss.apply(  # type: ignore[no-untyped-call]
        targets, logits, vocabulary, hidden, *trained
    )
    return result


class _OwnHeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        targets: torch.Tensor,
        logits: Callable[[torch.Tensor], torch.Tensor],
        vocabulary: int,
        *tensors: torch.Tensor,
    ) -> torch.Tensor:
        hidden, trained = tensors[0], tensors[1:]
        chosen = [i for i, wanted in enumerate(ctx.needs_input_grad[3:]) if wanted]
        sums = [torch.zeros_like(tensor) for tensor in tensors]
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        step = max(1, _LOGITS // _COPIES // vocabulary)
        for start in range(0, len(hidden), step):
            part = slice(start, start + step)
            with torch.set_grad_enabled(bool(chosen)):
                x = hidden[part].detach().requires_grad_(0 in chosen)
                loss = torch.nn.functional.cross_entropy(
                    logits(x).float(), targets[part], reduction="sum"
                )
            total += loss.detach().double()
            inputs = [x, *trained]
            found = torch.autograd.grad(
                loss, [inputs[i] for i in chosen], allow_unused=True
            ) if chosen else ()  # fmt: skip
            for i, gradient in zip(chosen, found, strict=True):
                if gradient is not None:
                    where = sums[i][part] if i == 0 else sums[i]
                    where += gradient
        ctx.save_for_backward(*sums)
        return total.to(hidden.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, factor: torch.Tensor) -> tuple[Any, ...]:
        return (None, None, None, *(gradient * factor for gradient in ctx.saved_tensors))
