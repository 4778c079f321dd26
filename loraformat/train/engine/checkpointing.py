"""A decoder layer that keeps its input and nothing else until the backward pass computes it again.

Gradient checkpointing (Chen 2016, arXiv:1604.06174) by layer. The graph is autograd's own, without
the numbers in it, so that gradients go wherever a class lets tensors go: into the next layer, or by
an object or a module that layers share. The numbers are computed again when the first of them is
wanted, from the arguments as they were.

It is known when a layer is entered and left, once in the forward pass and once in the backward
pass, which is when its weights are brought into memory and let go. Nothing depends on when
transformers calls hooks of its layers.

Where memory allows, some layers keep what their backward pass wants instead: see
`loraformat.train.engine.activation_budget`. They are left and entered all the same.

With rows at once, a batch goes through a layer in groups of rows before the next layer is read:
many micro-batches for one pass over the shards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

import torch
from torch.utils import _pytree as trees

from loraformat.train.engine.activation_budget import ActivationBudget
from loraformat.train.engine.backward_layer import BackwardVisit
from loraformat.train.engine.layer_call import LayerCall
from loraformat.train.engine.layer_prefetch import Residency
from loraformat.train.engine.recomputed_tensors import Forgotten, capturing
from loraformat.train.engine.rng_state import RandomState, random_restored, random_state
from loraformat.train.engine.saved_inputs import hold
from loraformat.train.engine.unneeded_products import UnreadProducts, has_forward_hooks

__all__ = ["Recomputation", "recompute_layer"]

#: With fewer tokens a pass is a step of generation: pages then stay where they are.
_FEW_TOKENS = 16


@dataclass(slots=True)
class Recomputation:
    """What all layers of a model share.

    Attributes
    ----------
    residency : Residency
    kept : ActivationBudget
        Which layers are not computed again.
    rows_at_once : int or None
        Rows of a batch that a layer computes together; None for all.
    inspect : callable or None
        Shown each layer's number and its call before it is computed forward.
    unread : UnreadProducts
        Which products are not computed again.
    visit : BackwardVisit
        Of the residency, in backward passes.
    sparing : bool
        Let layers go after a few tokens, too: slower generation, in as much memory as training.
    """

    residency: Residency
    kept: ActivationBudget
    rows_at_once: int | None = None
    inspect: Callable[[int, LayerCall], None] | None = None
    unread: UnreadProducts = field(default_factory=UnreadProducts)
    visit: BackwardVisit = field(init=False)
    sparing: bool = False

    def __post_init__(self) -> None:
        self.visit = BackwardVisit(self.residency)


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
        trained = any(parameter.requires_grad for parameter in layer.parameters())
        if torch.is_grad_enabled() and (call.differentiable or trained):
            return _Layer(layer, inner, number, shared).compute(call.with_gradient())
        with _entered(shared.residency, number, _FEW_TOKENS if shared.sparing else call.tokens):
            return _joined([part.run(inner) for part in call.groups(shared.rows_at_once)])

    layer.forward = forward


class _Layer:
    """A layer, computed with gradients.

    It holds nothing of one computation, whose graph holds it: a circle would be let go late.
    """

    def __init__(
        self, layer: torch.nn.Module, inner: Callable[..., Any], number: int, shared: Recomputation
    ) -> None:
        self._layer, self._inner, self._number, self._shared = layer, inner, number, shared

    def compute(self, call: LayerCall) -> Any:
        """Compute it; its backward pass enters and leaves it when gradients come by."""
        shared, number = self._shared, self._number
        keep = shared.rows_at_once is None and shared.kept.keeps(number, call.tokens)
        # The graph holds them for as long as it can be gone through; the hook on it must not.
        parts: WeakSet[Forgotten] = WeakSet()

        def enter(gradient: torch.Tensor) -> None:
            shared.visit.enter(number)

        def leave(gradient: torch.Tensor) -> None:
            for part in parts:
                part.clear()
            shared.visit.leave(number)

        if first := call.first_with_gradient():
            first[0].register_hook(leave)  # type: ignore[no-untyped-call]
        with _entered(shared.residency, number, call.tokens or _FEW_TOKENS):
            results = []
            for part in call.groups(shared.rows_at_once):
                forgotten = None if keep else self._forgotten(part)
                if forgotten is not None:
                    parts.add(forgotten)
                with nullcontext() if forgotten is None else forgotten.saving():
                    results.append(part.run(self._inner))
            output = _joined(results)
        for result in trees.tree_leaves(output):
            if torch.is_tensor(result) and result.requires_grad:
                result.register_hook(enter)  # type: ignore[no-untyped-call]
        return output

    def _forgotten(self, call: LayerCall) -> Forgotten:
        """Return what stands for what a computation saves, with all that it is repeated from."""
        held = call.to_repeat()
        of_cpu, of_devices = random_state(call.leaves)
        random = hold([of_cpu])[0], of_devices
        return Forgotten(lambda: self._again(held, random))

    def _again(self, held: LayerCall, random: RandomState) -> Sequence[torch.Tensor]:
        """Return what the backward pass wants: some of it without values, if nobody reads them."""
        shared, number = self._shared, self._number
        shared.visit.enter(number)
        guess = not has_forward_hooks(self._layer)
        while True:
            with (
                random_restored(random),
                torch.enable_grad(),
                shared.unread.left_out(number, guess=guess) as products,
                capturing() as saved,
            ):
                outputs = trees.tree_leaves(held.repeated().run(self._inner))
            if shared.unread.were_unread(number, outputs, products) or not guess:
                shared.kept.count(saved, held.tokens)
                return saved
            guess = False


@contextmanager
def _entered(residency: Residency, number: int, tokens: int) -> Iterator[None]:
    """Have a layer's weights in memory while it is computed forward."""
    if tokens < _FEW_TOKENS and not torch.is_grad_enabled():
        yield
        return
    residency.enter(number, 1)
    try:
        yield
    finally:
        residency.leave(number)


def _joined(results: list[Any]) -> Any:
    """Put the results for groups of rows together."""
    if len(results) == 1:
        return results[0]
    flat = [trees.tree_flatten(result) for result in results]
    joined = [
        torch.cat(pieces) if torch.is_tensor(pieces[0]) else pieces[0]
        for pieces in zip(*(leaves for leaves, _ in flat), strict=True)
    ]
    return trees.tree_unflatten(joined, flat[0][1])
