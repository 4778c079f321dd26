"""The second moment of z = A x, collected while a branch is trained.

`loraformat.reduce` needs E[z zᵀ] of the A that is stored, and training changes A: an old
observation is of another A. So the sums fade: a token counts half once `HALF_LIFE` more have
been seen. Sum and count fade alike, so that their quotient stays a weighted mean; several
processes add their sums and counts, and each fades faster by their number (`Moments.share`).

Counted are the positions that a trained token depends on: those with a gradient. So padding never
counts, whatever the model does with it, and a layer that is computed twice for one gradient
(activation checkpointing) counts once.

A gradient that should be zero may be rounding instead: that of the first token's query, which has
one key to look at and no choice. So a gradient counts as one only above `share_of_noise` of the
largest that went through the layer with it.
"""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["HALF_LIFE", "Moments", "counted", "observe", "share_of_noise"]

#: Tokens after which an observation counts half.
HALF_LIFE = 32768


def share_of_noise(dtype: torch.dtype) -> float:
    """Return the share of the largest gradient up to which one is taken for rounding: ε^¾ = 54 ε.

    For gradients in bfloat16 the ε is float32's, in which attention adds up. In float32, queries of
    first tokens had up to 3·10⁻⁷ of a batch's largest gradient (2.5 ε), and the smallest gradient
    of any other token was 7·10⁻⁴ of it. With activations in bfloat16 first tokens had up to
    1.4·10⁻⁷, and no other less than 10⁻².

    Examples
    --------
    >>> f"{share_of_noise(torch.float32):.1e}", f"{share_of_noise(torch.bfloat16):.1e}"
    ('6.4e-06', '6.4e-06')
    """
    adding = torch.float32 if dtype == torch.bfloat16 else dtype
    return float(torch.finfo(adding).eps ** 0.75)


class Moments:
    """Fading sums of z zᵀ. Each expert has sums of its own, which fade by its own tokens.

    Attributes
    ----------
    total, count : torch.Tensor
        float64 (rank, rank) or (experts, rank, rank), and () or (experts,): tokens, faded.
    half_life : float
        Tokens seen here after which one counts half.

    Examples
    --------
    >>> moments = Moments(2)
    >>> moments.add(torch.tensor([[1.0, 2.0], [3.0, 0.0]]))
    >>> moments.second_moment()
    tensor([[5., 1.],
            [1., 2.]])
    """

    def __init__(self, rank: int, experts: int = 0) -> None:
        leading = (experts,) if experts else ()
        self.total = torch.zeros(*leading, rank, rank, dtype=torch.float64)
        self.count = torch.zeros(leading, dtype=torch.float64)
        self.half_life: float = HALF_LIFE

    def share(self, processes: int) -> None:
        """Fade as one of several processes that see a part of the tokens each."""
        self.half_life = HALF_LIFE / processes

    def add(self, z: torch.Tensor, expert: int | None = None) -> None:
        """Add observations, (tokens, rank), of an expert if there are some."""
        if not len(z):
            return
        if self.total.device != z.device:
            self.total, self.count = self.total.to(z.device), self.count.to(z.device)
        at = ... if expert is None else expert
        fade = 0.5 ** (len(z) / self.half_life)
        wide = z.double()
        self.total[at] = self.total[at] * fade + wide.mT @ wide
        self.count[at] = self.count[at] * fade + len(z)

    def second_moment(self) -> torch.Tensor | None:
        """Return E[z zᵀ] as float32, symmetric; zero for experts without tokens.

        None if nothing was observed.
        """
        if not bool((self.count > 0).any()):
            return None
        counted = self.count.clamp(min=1e-300)[..., None, None]
        mean = torch.where(self.count[..., None, None] > 0, self.total / counted, 0.0)
        return ((mean + mean.mT) / 2).float().cpu()

    def state(self) -> dict[str, torch.Tensor]:
        """Return sums and count, as copies on the CPU."""
        return {"total": self.total.cpu().clone(), "count": self.count.cpu().clone()}

    def load(self, total: torch.Tensor, count: torch.Tensor) -> None:
        """Take sums and count over."""
        self.total.copy_(total)
        self.count.copy_(count)


def counted(z: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Return the rows of z that count, (tokens, rank), given the gradient of the output.

    Those are the ones whose gradient is more than zero and rounding.
    """
    sizes = torch.linalg.vector_norm(gradient, ord=torch.inf, dim=-1).reshape(-1)
    noise = sizes.max() * share_of_noise(gradient.dtype) if len(sizes) else 0
    return z.reshape(-1, z.shape[-1])[sizes > noise]


def observe(
    output: torch.Tensor, z: torch.Tensor, moments: Moments, expert: int | None = None
) -> torch.Tensor:
    """Return an output whose gradient will say which rows of z count: `moments` gets them.

    The output, (..., out), is made just now and used nowhere else: it is returned itself. z,
    (..., rank), is kept as activations are, so that checkpointing forgets it and makes it again.
    Rows count whose gradient is above `share_of_noise` of the largest here; each call of an
    expert's branch has a largest of its own.
    """
    observed: torch.Tensor = _Observation.apply(output, z.detach(), moments, expert)  # type: ignore[no-untyped-call]
    return observed


class _Observation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, output: torch.Tensor, z: torch.Tensor, moments: Moments, expert: int | None
    ) -> torch.Tensor:
        ctx.save_for_backward(z)
        ctx.moments, ctx.expert = moments, expert
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,), (z,) = gradients, ctx.saved_tensors
        ctx.moments.add(counted(z, gradient), ctx.expert)
        return gradient, None, None, None
