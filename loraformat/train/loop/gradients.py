"""From gradients of a sum to the gradient that the optimizer takes.

Every forward pass gives the gradient of a *sum* of negative log-likelihoods; sums are added up
over micro-batches and ranks and divided once, by the number of all tokens that were learned. So
a step does not depend on how its rows were cut into micro-batches, however ragged they are; a
mean of means would.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

__all__ = ["clipped_mean", "flat", "non_finite", "norm", "spread"]


def norm(parameters: Iterable[torch.nn.Parameter]) -> float:
    """Return the Euclidean norm of all gradients together, summed in float64."""
    squares = [
        torch.linalg.vector_norm(p.grad, dtype=torch.float64).square()
        for p in parameters
        if p.grad is not None
    ]
    return float(torch.stack(squares).sum().sqrt()) if squares else 0.0


def clipped_mean(
    parameters: Iterable[torch.nn.Parameter], tokens: int, limit: float | None
) -> float:
    """Divide gradients of a sum by its number of terms, and bound their norm.

    Parameters
    ----------
    parameters : iterable of torch.nn.Parameter
        Their ``grad`` is changed in place, rounded once.
    tokens : int
        Number of terms of the sum.
    limit : float or None
        Largest norm of the mean gradient; a longer one is shortened to it, as
        ``torch.nn.utils.clip_grad_norm_`` does.

    Returns
    -------
    float
        The norm before it was bounded; NaN or infinite gradients are left alone.

    Examples
    --------
    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> weight.grad = torch.tensor([6.0, 8.0])
    >>> clipped_mean([weight], 2, 1.0), weight.grad
    (5.0, tensor([0.6000, 0.8000]))
    """
    kept = [p for p in parameters if p.grad is not None]
    length = norm(kept) / tokens
    factor = 1.0 if limit is None or not length > limit else limit / length
    for parameter in kept:
        assert parameter.grad is not None
        parameter.grad.mul_(factor / tokens)
    return length


def non_finite(parameters: Mapping[str, torch.nn.Parameter]) -> str | None:
    """Return the name of the first parameter whose gradient has NaN or infinity, if one has."""
    for name, parameter in parameters.items():
        if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
            return name
    return None


def flat(parameters: Iterable[torch.nn.Parameter], extra: Iterable[float]) -> torch.Tensor:
    """Return all gradients behind each other, and a few numbers at the end.

    Parameters
    ----------
    parameters : iterable of torch.nn.Parameter
        One without a gradient counts as zeros.
    extra : iterable of float
        Numbers that are to be summed along; float32 must hold them.

    Returns
    -------
    torch.Tensor
        float32 ``[numbers]``.
    """
    pieces = [
        (p.grad if p.grad is not None else torch.zeros_like(p)).reshape(-1).float()
        for p in parameters
    ]
    device = pieces[0].device if pieces else None
    return torch.cat([*pieces, torch.tensor(list(extra), dtype=torch.float32, device=device)])


def spread(vector: torch.Tensor, parameters: Iterable[torch.nn.Parameter]) -> None:
    """Put gradients that `flat` made one of back where they came from."""
    position = 0
    for parameter in parameters:
        piece = vector[position : position + parameter.numel()].view_as(parameter)
        position += parameter.numel()
        if parameter.grad is None:
            parameter.grad = piece.clone()
        else:
            parameter.grad.copy_(piece)
