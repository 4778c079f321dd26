"""A decoder layer that keeps its input and nothing else until the backward pass computes it again.

Gradient checkpointing (Chen 2016, arXiv:1604.06174) by layer, as one autograd function, so that it
is known exactly when a layer is entered and left: once in the forward pass and once in the
backward pass, which is when its weights are brought into memory and let go. Nothing depends on
when transformers calls hooks of its layers.

The first computation has no gradient and the second has. What is collected on the way, of a
branch, is collected in the backward pass, and so once.

Where memory allows, some layers keep what their backward pass wants instead: see
`loraformat.train.engine.kept_activations`. They are left and entered all the same.

With rows at once, a batch goes through a layer in groups of rows before the next layer is read:
many micro-batches for one pass over the shards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.utils import _pytree as trees

from loraformat.train.engine.backward_edges import mark
from loraformat.train.engine.held_input import hold
from loraformat.train.engine.kept_activations import KeptActivations
from loraformat.train.engine.layer_call import LayerCall
from loraformat.train.engine.random_state import random_restored, random_state, set_random
from loraformat.train.engine.residency import Residency
from loraformat.train.engine.unread import UnreadProducts, has_forward_hooks

__all__ = ["Recomputation", "recompute_layer"]

#: With fewer tokens a pass is a step of generation: pages then stay where they are.
_FEW_TOKENS = 16


@dataclass(slots=True)
class Recomputation:
    """What all layers of a model share.

    Attributes
    ----------
    residency : Residency
    kept : KeptActivations
        Which layers are not computed again.
    rows_at_once : int or None
        Rows of a batch that a layer computes together; None for all.
    inspect : callable or None
        Shown each layer's number and its call before it is computed forward.
    unread : UnreadProducts
        Which products are not computed again.
    """

    residency: Residency
    kept: KeptActivations
    rows_at_once: int | None = None
    inspect: Callable[[int, LayerCall], None] | None = None
    unread: UnreadProducts = field(default_factory=UnreadProducts)


def recompute_layer(layer: torch.nn.Module, number: int, shared: Recomputation) -> None:
    """Let a layer be computed anew in the backward pass, and its weights come and go.

    Parameters
    ----------
    layer : Module
        Of a transformers model; its ``forward`` is wrapped, on this instance.
    number : int
        Of the layer, as the residency counts.
    shared : Recomputation
    """
    inner = layer.forward

    def forward(*arguments: Any, **options: Any) -> Any:
        call = LayerCall.of(arguments, options)
        if shared.inspect is not None:
            shared.inspect(number, call)
        trained = [p for p in layer.parameters() if p.requires_grad]
        if torch.is_grad_enabled() and (call.differentiable or trained):
            if shared.rows_at_once is None and shared.kept.keeps(number, call.tokens):
                return _keep(inner, call, number, shared.residency)
            structures: list[Any] = []
            inputs = [call.leaves[i] for i in call.differentiable]
            outputs = _Recomputed.apply(  # type: ignore[no-untyped-call]
                layer, inner, call, number, shared, structures, len(inputs), *inputs, *trained
            )
            return trees.tree_unflatten(list(outputs), structures[0])
        with _entered(shared.residency, number, 1, call.tokens):
            return _join(inner, call, shared.rows_at_once)

    layer.forward = forward


def _keep(inner: Callable[..., Any], call: LayerCall, number: int, residency: Residency) -> Any:
    """Compute a layer as it is; the backward pass enters and leaves it by marks in the graph."""
    leaves = list(call.leaves)
    first = call.differentiable[0] if call.differentiable else call.hidden
    if not leaves[first].requires_grad:  # the first layer: its input's gradient says when it ends
        leaves[first] = leaves[first].detach().requires_grad_()
    leaves[first] = mark(leaves[first], lambda: residency.leave(number))
    with _entered(residency, number, 1, call.tokens):
        output = replace(call, leaves=leaves).run(inner)
    results, structure = trees.tree_flatten(output)
    last = next(i for i, x in enumerate(results) if torch.is_tensor(x) and x.requires_grad)
    results[last] = mark(results[last], lambda: residency.enter(number, -1))
    return trees.tree_unflatten(results, structure)


@contextmanager
def _entered(residency: Residency, number: int, direction: int, tokens: int) -> Iterator[None]:
    if tokens < _FEW_TOKENS and not torch.is_grad_enabled() and direction > 0:
        yield
        return
    residency.enter(number, direction)
    try:
        yield
    finally:
        residency.leave(number)


def _join(inner: Callable[..., Any], call: LayerCall, rows_at_once: int | None) -> Any:
    """Run a call in groups of rows and put the results together."""
    results = [part.run(inner) for _, part in call.groups(rows_at_once)]
    if len(results) == 1:
        return results[0]
    flat = [trees.tree_flatten(result) for result in results]
    joined = [
        torch.cat(pieces) if torch.is_tensor(pieces[0]) else pieces[0]
        for pieces in zip(*(leaves for leaves, _ in flat), strict=True)
    ]
    return trees.tree_unflatten(joined, flat[0][1])


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        layer: torch.nn.Module,
        inner: Callable[..., Any],
        call: LayerCall,
        number: int,
        shared: Recomputation,
        structures: list[Any],
        count: int,
        *tensors: torch.Tensor,
    ) -> tuple[Any, ...]:
        ctx.layer, ctx.inner, ctx.number, ctx.shared = layer, inner, number, shared
        ctx.count = count
        ctx.rows_at_once = shared.rows_at_once
        # Arguments without a gradient are the same for all layers, and held as they are.
        ctx.call = call.with_inputs([torch.empty(0)] * count)
        ctx.save_for_backward(*hold(tensors[:count]), *tensors[count:])
        of_cpu, of_devices = random_state(tensors)
        ctx.random = hold([of_cpu])[0], of_devices
        with _entered(shared.residency, number, 1, call.tokens or _FEW_TOKENS):
            output = _join(inner, call, shared.rows_at_once)
        leaves, structure = trees.tree_flatten(output)
        structures.append(structure)
        return tuple(leaves)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[Any, ...]:
        inputs, trained = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
        call = ctx.call.with_inputs(inputs)
        found = _Gradients(inputs, trained)
        with (
            _entered(ctx.shared.residency, ctx.number, -1, call.tokens),
            random_restored(ctx.random),
            torch.enable_grad(),
        ):
            for rows, part in call.groups(ctx.rows_at_once):
                guess = not has_forward_hooks(ctx.layer)
                outputs = found.compute(ctx.inner, part, ctx.number, ctx.shared, guess)
                found.add(outputs, rows, call.rows, gradients)
        return (None,) * 7 + found.of_inputs + found.of_trained


class _Gradients:
    """Sums up the gradients of groups of rows."""

    def __init__(self, inputs: Sequence[torch.Tensor], trained: Sequence[torch.Tensor]) -> None:
        self._inputs, self._trained = inputs, trained
        self._parts: list[list[torch.Tensor]] = []
        self._sums: list[torch.Tensor | None] = [None] * len(trained)
        self._whole: list[torch.Tensor | None] = []
        self._fresh: list[torch.Tensor] = []

    def compute(
        self,
        inner: Callable[..., Any],
        call: LayerCall,
        layer: int,
        shared: Recomputation,
        guess: bool,
    ) -> list[Any]:
        """Compute a group's rows again; returns the outputs, flat: a graph, and maybe no values."""
        before, left_out = random_state(call.leaves), shared.unread.left_out
        while True:
            self._fresh = [call.leaves[i].detach().requires_grad_() for i in call.differentiable]
            with shared.kept.counting(call.tokens), left_out(layer, guess=guess) as products:
                outputs, _ = trees.tree_flatten(call.with_inputs(self._fresh).run(inner))
            if shared.unread.were_unread(layer, outputs, products) or not guess:
                return outputs
            guess = False
            set_random(before)

    def add(
        self,
        outputs: list[Any],
        rows: slice,
        all_rows: int,
        gradients: Sequence[torch.Tensor | None],
    ) -> None:
        """Go back through what was computed last."""
        whole = rows == slice(0, all_rows)
        pairs = [
            (output, gradient if whole else gradient[rows])
            for output, gradient in zip(outputs, gradients, strict=True)
            if torch.is_tensor(output) and output.requires_grad and gradient is not None
        ]
        wanted = [*self._fresh, *self._trained]
        results: Sequence[torch.Tensor | None] = [None] * len(wanted)
        if pairs:
            results = torch.autograd.grad(
                [output for output, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True
            )
        self._gather(results, rows, all_rows)

    def _gather(self, results: Sequence[torch.Tensor | None], rows: slice, all_rows: int) -> None:
        if not self._whole:
            self._whole = [None] * len(self._inputs)
        for i, result in enumerate(results[: len(self._inputs)]):
            if result is None:
                continue
            tensor = self._inputs[i]
            by_rows = rows != slice(0, all_rows) and tensor.shape[0] == all_rows
            if not by_rows:
                earlier = self._whole[i]
                self._whole[i] = result if earlier is None else earlier + result
                continue
            whole = self._whole[i]
            if whole is None:
                whole = self._whole[i] = torch.zeros_like(tensor)
            whole[rows] = result
        for i, result in enumerate(results[len(self._inputs) :]):
            if result is not None:
                earlier = self._sums[i]
                self._sums[i] = result if earlier is None else earlier + result

    @property
    def of_inputs(self) -> tuple[torch.Tensor | None, ...]:
        return tuple(self._whole)

    @property
    def of_trained(self) -> tuple[torch.Tensor | None, ...]:
        return tuple(self._sums)
