"""The low-rank branch of a frozen layer (Hu 2021, equation 3): y = W x + s · B A x.

A is (r, in), B is (out, r), both float32 whatever the layer computes in. Variants of one idea:

- a linear's branch sees the layer's input and output (`LoraBranch`); with a magnitude m the
  result is m · (W x + s · B A x) / ‖W + s · B A‖, the norm a constant (DoRA, Liu 2024);
- an embedding's sees token ids: A x is a column of A (`_EmbeddingBranch`);
- a stack of experts has a pair for each (`_ExpertBranch`);
- a matrix that its class multiplies by itself, a router's, is changed before it does
  (`_ParameterBranch`).

A branch may begin at a base's own directions (PiSSA): then s · B A x is computed with the first
factors taken off, s · (B A − B₀ A₀) x, so that the base stays what it is. Side by side, A over
A₀ and B beside −B₀, these are one plain pair of twice the rank: `LoraBranch.effective`.

Dropout zeroes inputs of A alone. With DoRA, PEFT multiplies the base by what dropout left of the
input; here the base's output is used as it is, which costs no second product.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from loraformat.train.engine.linear import LoraFactors
from loraformat.train.lora.second_moments import Moments, counted, observe
from loraformat.train.lora.target_modules import TargetModule

__all__ = ["Factors", "LoraBranch", "RowNorms", "branch_of", "row_norms"]

_Views = tuple[torch.Tensor, ...]


@dataclass(frozen=True, slots=True)
class Factors:
    """Where a branch begins.

    Attributes
    ----------
    a, b : torch.Tensor
        float32 (r, in) and (out, r); of experts with a leading dimension.
    fixed : tuple of torch.Tensor, or None
        A₀ and B₀, whose product is taken off.
    """

    a: torch.Tensor
    b: torch.Tensor
    fixed: tuple[torch.Tensor, torch.Tensor] | None = None


class LoraBranch(nn.Module):
    """The branch of a linear, or of the output head.

    It begins as `factors`. `scaling` is s, and `dropout` the share of the inputs of A that are
    zeroed while training. With `dora` a magnitude is trained, float32 (out,), which begins as
    ‖W + s · B A‖. While `collecting`, the second moments of A x are added to `moments` in every
    backward pass.
    """

    #: What PEFT calls the factors, after the module's name.
    keys = ("lora_A.weight", "lora_B.weight")

    def __init__(
        self,
        target: TargetModule,
        factors: Factors,
        scaling: float,
        *,
        dropout: float = 0.0,
        dora: bool = False,
        collecting: bool = True,
    ) -> None:
        super().__init__()
        self.target, self.scaling = target, scaling
        self.dropout, self.collecting = dropout, collecting
        self.a = nn.Parameter(factors.a.to(target.device))
        self.b = nn.Parameter(factors.b.to(target.device))
        for name, fixed in zip(("fixed_a", "fixed_b"), factors.fixed or (None, None), strict=True):
            self.register_buffer(name, None if fixed is None else fixed.to(target.device))
        self.fixed_a: torch.Tensor | None
        self.fixed_b: torch.Tensor | None
        self._norms = RowNorms(target)
        self.magnitude: nn.Parameter | None = None
        if dora:
            self.magnitude = nn.Parameter(self._norms(*self.effective(), scaling).clone())
        self.moments = Moments(self.rank, target.experts)

    @property
    def rank(self) -> int:
        """Rank of the adapter that is written: twice that of A if factors are taken off."""
        return self.a.shape[-2] * (1 if self.fixed_a is None else 2)

    def effective(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return A and B, concatenated with the subtracted factors: the delta is s · B A."""
        if self.fixed_a is None or self.fixed_b is None:
            return self.a, self.b
        return torch.cat([self.a, self.fixed_a], -2), torch.cat([self.b, -self.fixed_b], -1)

    def named(self) -> dict[str, nn.Parameter]:
        """Return what is trained, by PEFT's key without the module's name."""
        named = {self.keys[0]: self.a, self.keys[1]: self.b}
        if self.magnitude is not None:
            named["lora_magnitude_vector"] = self.magnitude
        return named

    def pair(self) -> LoraFactors | None:
        """Return A, B and s as a linear multiplies them; None with dropout or a magnitude."""
        if self.magnitude is not None or (self.dropout and self.training):
            return None
        observe = self._observed if self.collecting and self.training else None
        return LoraFactors(*self.effective(), self._factor(), observe)

    def _observed(self, z: torch.Tensor, gradient: torch.Tensor) -> None:
        self.moments.add(counted(z, gradient))

    def forward(self, x: torch.Tensor, base_output: torch.Tensor) -> torch.Tensor:
        """Return the layer's output (..., out) with the branch's, for an input (..., in)."""
        inputs = x.to(self.a.dtype)
        a, b = self.effective()
        if self.dropout and self.training:
            # What is taken off belongs to the base, which sees all of the input.
            seen = functional.dropout(inputs, self.dropout)
            z = functional.linear(seen, a[: len(self.a)])
            if self.fixed_a is not None:
                z = torch.cat([z, functional.linear(inputs, self.fixed_a)], -1)
            with torch.no_grad():
                observed = functional.linear(inputs, a)
        else:
            observed = z = functional.linear(inputs, a)
        return self._added(z, b, base_output, observed)

    def _added(
        self,
        z: torch.Tensor,
        b: torch.Tensor,
        base_output: torch.Tensor,
        observed: torch.Tensor,
        expert: int | None = None,
    ) -> torch.Tensor:
        """Return the base's output plus s · B z, scaled to its magnitude."""
        base = base_output.to(b.dtype)
        bias = self.target.bias if self.magnitude is not None else None
        if bias is not None:  # the magnitude is that of the weight alone
            base = base - bias
        flat = base.reshape(-1, base.shape[-1])
        output = torch.addmm(flat, z.reshape(-1, z.shape[-1]), b.T, alpha=self._factor())
        if self.magnitude is not None:
            output = output * (self.magnitude / self._norms(*self.effective(), self.scaling))
        if bias is not None:
            output = output + bias
        if self.collecting and self.training and output.requires_grad:
            output = observe(output, observed, self.moments, expert)
        return output.view(base.shape).to(base_output.dtype)

    def _factor(self) -> float:
        return self.scaling * self.target.output_scale


class _EmbeddingBranch(LoraBranch):
    """The branch of a token embedding: A is (r, tokens) and a token's A x a column of it."""

    keys = ("lora_embedding_A", "lora_embedding_B")

    def forward(self, x: torch.Tensor, base_output: torch.Tensor) -> torch.Tensor:
        """Return the embedded tokens with the branch's part: `x` are token ids, int64 (...).

        No dropout is applied, as in PEFT.
        """
        a, b = self.effective()
        z = functional.embedding(x, a.T)
        return self._added(z, b, base_output, z)


class _ExpertBranch(LoraBranch):
    """The branches of a stack of experts: A is (experts, r, in), B is (experts, out, r).

    PEFT adapts such a parameter (``target_parameters``) without dropout and without magnitudes,
    and so it is here.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._views = _ExpertViews()

    def pair(self, expert: int = 0) -> LoraFactors:
        """Return an expert's A, B and s as its product with the base takes them."""
        observe = None
        if self.collecting and self.training:

            def observe(z: torch.Tensor, gradient: torch.Tensor) -> None:
                self.moments.add(counted(z, gradient), expert)

        return LoraFactors(*self._factors_of(expert), self._factor(), observe)

    def _factors_of(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = (views[expert] for views in self._views.of(self.a, self.b))
        if self.fixed_a is not None and self.fixed_b is not None:
            a = torch.cat([a, self.fixed_a[expert]], 0)
            b = torch.cat([b, -self.fixed_b[expert]], 1)
        return a, b

    def forward(self, x: torch.Tensor, base_output: torch.Tensor, expert: int = 0) -> torch.Tensor:
        """Return one expert's output with its branch's; `x` holds the tokens sent to it."""
        a, b = self._factors_of(expert)
        z = functional.linear(x.to(a.dtype), a)
        return self._added(z, b, base_output, z, expert)


class _ParameterBranch(LoraBranch):
    """The branch of a parameter that its class computes with by itself.

    Nothing of the inputs is seen: there is no dropout, no magnitude, and no statistics.
    """

    def forward(self, weight: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Return the weight with its delta, (out, in), rounded once to its dtype."""
        a, b = self.effective()
        return torch.addmm(weight.to(b.dtype), b, a, alpha=self.scaling).to(weight.dtype)


def branch_of(
    target: TargetModule,
    factors: Factors,
    scaling: float,
    *,
    dropout: float,
    dora: bool,
    collecting: bool,
) -> LoraBranch:
    """Return the branch that fits a target; see `LoraBranch`."""
    if target.kind in ("experts", "parameter"):
        dropout, dora, collecting = 0.0, False, collecting and target.kind == "experts"
    return _KINDS.get(target.kind, LoraBranch)(
        target, factors, scaling, dropout=dropout, dora=dora, collecting=collecting
    )


_KINDS: dict[str, type[LoraBranch]] = {
    "embedding": _EmbeddingBranch,
    "experts": _ExpertBranch,
    "parameter": _ParameterBranch,
}


class _ExpertViews:
    """The factors of each expert as views of two stacks, made once.

    Taking one matrix out of a stack of E makes a gradient of the whole stack, E times over: with
    128 experts that costs more than all the rest. ``unbind`` makes all views at once, and its
    backward pass gathers their gradients once. It keeps nothing but shapes, so that the views serve
    every pass until the stack is another tensor, or an optimizer has written to it.
    """

    def __init__(self) -> None:
        self._key: tuple[object, ...] | None = None
        self._views: tuple[_Views, _Views] = ((), ())

    def of(self, a: torch.Tensor, b: torch.Tensor) -> tuple[_Views, _Views]:
        """Return the matrices of both stacks, expert by expert."""
        key = (
            torch.is_grad_enabled(),
            *((id(s), s.data_ptr(), s._version, s.device, s.requires_grad) for s in (a, b)),
        )
        if key != self._key:
            self._key, self._views = key, (a.unbind(0), b.unbind(0))
        return self._views

    def __deepcopy__(self, memo: object) -> _ExpertViews:
        return _ExpertViews()  # views belong to one stack

    def __reduce__(self) -> tuple[type[_ExpertViews], tuple[()]]:
        return _ExpertViews, ()


def row_norms(
    target: TargetModule, a: torch.Tensor, b: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Return ‖W + scaling · B A‖ for each output feature: float32 (out,).

    DoRA's norm (Liu 2024, equation 5), a constant in the gradient (section 4.3). W, of a linear or
    an embedding, is seen tile by tile, so it is never in memory as a whole.
    """
    with torch.no_grad():
        if target.kind == "embedding":
            squares = torch.zeros(len(b), dtype=torch.float64, device=b.device)
            for first, last, tile in target.tiles(0):
                moved = torch.addmm(tile, a[:, first:last].T, b.T, alpha=scaling)
                squares += moved.square().sum(0, dtype=torch.float64)
            return squares.sqrt().to(b.dtype)
        norms = torch.empty(len(b), dtype=b.dtype, device=b.device)
        for first, last, tile in target.tiles(0):
            moved = torch.addmm(tile, b[first:last], a, alpha=scaling)
            torch.linalg.vector_norm(moved, dim=1, out=norms[first:last])
        return norms


class RowNorms:
    """`row_norms` of one target, kept until the factors change.

    An optimizer changes them once per step, so that a checkpointed layer and accumulated batches
    cost one pass.
    """

    def __init__(self, target: TargetModule) -> None:
        self._target = target
        self._factors: tuple[torch.Tensor, torch.Tensor] | None = None
        self._norms: torch.Tensor | None = None

    def __call__(self, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
        """Return the norms for these factors."""
        known = self._factors
        # Compared by value: an optimizer may write past torch's version counters.
        same = known is not None and torch.equal(known[0], a) and torch.equal(known[1], b)
        if self._norms is None or not same:
            self._factors = a.detach().clone(), b.detach().clone()
            self._norms = row_norms(self._target, *self._factors, scaling)
        return self._norms
