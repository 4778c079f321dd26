"""Cross-entropy of the output head, without the logits of all tokens at once.

    L = Σ_t (log Σ_v exp z_tv − z_t,y_t),   dL/dz_tv = softmax(z_t)_v − [v = y_t]

A few tokens at a time, the head goes over its vocabulary tile by tile into a reused buffer; the
gradient of the hidden states is computed at once and kept instead of the logits. Logits have the
dtype of the hidden states, softmax is computed in float32, and the sum over tokens in float64.

Between its last hidden states and its logits a class may scale (Cohere, Granite) or cap (Gemma 2:
c · tanh(z / c)). Its source is not read; its ``forward`` is run with a decoder and a head that
return known numbers, and what comes out must be what a rule says. A class for which none does keeps
its own ``forward``, on a few tokens at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from loraformat.train.engine.buffers import workspace
from loraformat.train.engine.linear import FrozenLinear
from loraformat.train.engine.matmul import (
    even_rows,
    multiply,
    multiply_transposed,
    threaded_product,
)
from loraformat.train.engine.meta_model import decoder_of

__all__ = ["HeadRule", "find_head_rule", "frozen_head_loss", "own_head_loss", "own_logits"]

#: Bytes of logits that are held at once.
_LOGITS = 128 << 20
#: Copies of them that autograd holds where the head is trained.
_COPIES = 4
#: Logits that are turned into slopes at once: by a thread half a MB of float32, which its cache
#: holds, and by another device so many that their copies take little memory.
_CACHED = 1 << 17
_ON_DEVICE = 1 << 20
#: Tokens in one piece of a thread's work.
_PIECE_ROWS = 32


@dataclass(frozen=True, slots=True)
class HeadRule:
    """logits = cap(scale · (W · before · h + b)), with cap(z) = c · tanh(z / c).

    Attributes
    ----------
    before, scale : float
    cap : float or None
    """

    before: float = 1.0
    scale: float = 1.0
    cap: float | None = None

    def apply_(self, z: torch.Tensor) -> torch.Tensor:
        """Turn what the head returns into logits, in place.

        Examples
        --------
        >>> HeadRule(scale=0.5).apply_(torch.tensor([4.0]))
        tensor([2.])
        """
        if self.cap is None:
            return z if self.scale == 1 else z.mul_(self.scale)
        return z.mul_(self.scale / self.cap).tanh_().mul_(self.cap)


class _Output:
    """Stand-in for transformers' output classes: hidden states, and None for the rest."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: int) -> torch.Tensor | None:
        return self.last_hidden_state if index == 0 else None

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


@contextmanager
def _standing_in(module: Any, value: Any) -> Iterator[list[Any]]:
    """Let a module return a value while it lasts; yields the first arguments of its calls."""
    seen: list[Any] = []

    def forward(*arguments: Any, **_: Any) -> Any:
        seen.append(next(iter(arguments), None))
        return value

    module.forward = forward
    try:
        yield seen
    finally:
        del module.forward


def own_logits(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Return the logits (tokens, vocabulary) that a model's own class makes of hidden states.

    `hidden` is (tokens, hidden size), after the last norm.
    """
    tokens = torch.zeros(1, len(hidden), dtype=torch.int64, device=hidden.device)
    with _standing_in(decoder_of(model), _Output(hidden[None])):
        output = model.forward(input_ids=tokens, use_cache=False, return_dict=True)
    logits: torch.Tensor = output.logits
    return logits.reshape(len(hidden), -1)


def find_head_rule(model: Any, head: FrozenLinear, cap: float | None) -> HeadRule | None:
    """Find the rule of a class by asking it; None if no rule gives what the class gives.

    `cap` is what the config says of capping.
    """
    z = torch.cat([torch.tensor([1.0, 1e-3]), torch.linspace(-90.0, 90.0, 62)]).repeat(2, 1)
    hidden = torch.linspace(-2.0, 2.0, 2 * head.in_features).view(2, -1) + 0.01
    try:
        with torch.no_grad(), _standing_in(head, z.clone()[None]) as inputs:
            found = own_logits(model, hidden.clone())
            seen = inputs[-1]
    except Exception:  # a class of anybody's, with more than a rule before its head
        return None
    if seen is None or found.shape != z.shape or seen.numel() != hidden.numel():
        return None
    before = float(seen.reshape(-1)[0] / hidden.reshape(-1)[0])
    small = float(found[0, 1] / z[0, 1])
    rule = HeadRule(before, small if cap is not None else float(found[0, 0]), cap)
    same = torch.allclose(seen.view_as(hidden), hidden * before, rtol=1e-5, atol=0)
    fits = torch.allclose(found, rule.apply_(z.clone()), rtol=1e-5, atol=1e-6)
    return rule if same and fits else None


def frozen_head_loss(
    hidden: torch.Tensor, targets: torch.Tensor, head: FrozenLinear, rule: HeadRule
) -> torch.Tensor:
    """Return the loss (float32 scalar) of a head that has no branch.

    `hidden` is (tokens, hidden size), float32 or bfloat16; `targets` are int64 (tokens,).

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
        step = max(1, _LOGITS // hidden.element_size() // head.out_features)
        for start in range(0, len(hidden), step):
            part = slice(start, start + step)
            loss, slope = _chunk(hidden[part], targets[part], head, rule, wanted)
            total += loss
            if slope is not None:
                multiplied = multiply_transposed(slope, head.matrix, head.dtype)
                gradient[part] = multiplied[: len(targets[part])].mul_(rule.before)
        # With a large vocabulary it would be the largest of all buffers, idle until the next step.
        workspace.forget("logits")
        ctx.save_for_backward(gradient)
        return total.to(_loss_dtype(hidden))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, factor: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return _scaled(gradient, factor), None, None, None


def _chunk(
    hidden: torch.Tensor,
    targets: torch.Tensor,
    head: FrozenLinear,
    rule: HeadRule,
    wanted: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return some tokens' loss, and its slope in what the head returns, maybe with a zero row."""
    x = even_rows(hidden if rule.before == 1 else hidden * rule.before)
    out = workspace.take("logits", (len(x), head.out_features), x.dtype, x.device)
    multiply(x, head.matrix, head.dtype, out=out)
    y, padding = out[: len(hidden)], out[len(hidden) :]
    if head.bias is not None:
        y += head.bias
    losses = torch.empty(len(y), dtype=torch.float64, device=x.device)

    on_cpu = x.device.type == "cpu"
    step = max(1, (_CACHED if on_cpu else _ON_DEVICE) // head.out_features)

    def piece(start: int, stop: int) -> None:
        for first in range(start, stop, step):
            part = slice(first, min(first + step, stop))
            losses[part] = _turn_to_slope_(y[part], targets[part, None], rule, wanted)

    if on_cpu:
        threaded_product(piece, 0, len(y), _PIECE_ROWS, 1)
    else:
        piece(0, len(y))
    padding.zero_()
    return losses.sum(), out if wanted else None


def _turn_to_slope_(
    rows: torch.Tensor, targets: torch.Tensor, rule: HeadRule, wanted: bool
) -> torch.Tensor:
    """Return the losses of some rows of what the head returned, which become its slope there."""
    z = rule.apply_(rows.to(_loss_dtype(rows)))
    chosen = z.gather(1, targets)
    normalizer = z.logsumexp(1, keepdim=True)
    if wanted:
        slope = None if rule.cap is None else (1 - (z / rule.cap).square_())
        # p - 1 of the token that came, without the rounding of p where that is near one
        z.sub_(normalizer).exp_().scatter_(1, targets, (chosen - normalizer).expm1_())
        if slope is not None:
            z.mul_(slope)
        if rule.scale != 1:
            z.mul_(rule.scale)
        if z is not rows:
            rows.copy_(z)
    return (normalizer - chosen)[:, 0].double()


def _scaled(gradient: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Multiply by a factor that is not rounded first: a bfloat16 tensor would have it so."""
    return (gradient.to(factor.dtype) * factor).to(gradient.dtype)


def _loss_dtype(hidden: torch.Tensor) -> torch.dtype:
    return torch.promote_types(hidden.dtype, torch.float32)


def own_head_loss(
    hidden: torch.Tensor,
    targets: torch.Tensor,
    logits: Callable[[torch.Tensor], torch.Tensor],
    vocabulary: int,
    trained: Sequence[torch.Tensor],
) -> torch.Tensor:
    """Return the loss of a head that is trained itself, or that no rule describes.

    `hidden` and `targets` are as in `frozen_head_loss`. `logits` makes the logits of some hidden
    states, differentiably; `trained` are the head's parameters.
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
        step = max(1, _LOGITS // hidden.element_size() // _COPIES // vocabulary)
        for start in range(0, len(hidden), step):
            part = slice(start, start + step)
            with torch.set_grad_enabled(bool(chosen)):
                x = hidden[part].detach().requires_grad_(0 in chosen)
                loss = torch.nn.functional.cross_entropy(
                    logits(x).float(), targets[part], reduction="sum"
                )
            total += loss.detach().double()
            wanted = [[x, *trained][i] for i in chosen]
            found = torch.autograd.grad(loss, wanted, allow_unused=True) if wanted else ()
            for i, gradient in zip(chosen, found, strict=True):
                if gradient is not None:
                    where = sums[i][part] if i == 0 else sums[i]
                    where += gradient
        ctx.save_for_backward(*sums)
        return total.to(_loss_dtype(hidden))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, factor: torch.Tensor) -> tuple[Any, ...]:
        found = [_scaled(gradient, factor) for gradient in ctx.saved_tensors]
        return None, None, None, *found
