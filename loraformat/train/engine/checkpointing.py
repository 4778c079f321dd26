"""Gradient-checkpointed decoder layers, whose weights are in memory only while they are computed.

Gradient checkpointing (Chen 2016, arXiv:1604.06174) by layer. The graph is autograd's own, made
once, without the numbers in it, so that gradients go wherever a class lets tensors go: into the
next layer, or through an object or a module that layers share. The numbers are computed again when
the backward pass asks for the first of them, from the arguments as they were.

A layer is entered and left once in the forward pass and once in the backward pass, which is when
its weights are read and evicted. Nothing depends on when transformers calls hooks of its layers.

Recomputing a layer costs a third more time, and saving its activations costs memory for them. They
are counted once, when a layer is first recomputed, and from then on as many of the last layers save
theirs as a budget allows (`ActivationBudget`): those are the first to give them back. They are
entered and left all the same, and the gradients are the same bits either way.

With rows at once, a batch goes through a layer in groups of rows before the next layer is read:
many micro-batches for one pass over the shards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

import torch
from torch.utils import _pytree as trees

from loraformat.errors import UnsupportedError
from loraformat.train.engine.buffers import save_inputs
from loraformat.train.engine.layer_call import LayerCall, RngState, restored_rng_state, rng_state
from loraformat.train.engine.layer_prefetch import LayerPrefetcher
from loraformat.train.engine.matrix import Matrix
from loraformat.train.engine.unneeded_products import has_forward_hooks, leaving_out

__all__ = ["ActivationBudget", "Checkpointing", "checkpoint_layer"]

#: With fewer tokens a pass is a step of generation: pages then stay where they are.
_FEW_TOKENS = 16

#: What a heap takes for what is kept in it: there are holes between. 1.65 to 1.75 were measured.
_IN_HEAP = 1.8


@dataclass(slots=True)
class Checkpointing:
    """State of gradient checkpointing that all layers of a model share.

    Attributes
    ----------
    prefetcher, activation_budget
    rows_at_once : int or None
        Rows of a batch that a layer computes together; None for all.
    inspect : callable or None
        Called with each layer's number and its call before it is computed forward.
    unneeded : dict of int to str
        By the number of a layer, the linear in it whose product is not recomputed.
    sparing : bool
        Evict layers after a few tokens, too: slower generation, in as much memory as training.
    """

    prefetcher: LayerPrefetcher
    activation_budget: ActivationBudget
    rows_at_once: int | None = None
    inspect: Callable[[int, LayerCall], None] | None = None
    unneeded: dict[int, str] = field(default_factory=dict)
    sparing: bool = False


def checkpoint_layer(layer: torch.nn.Module, number: int, shared: Checkpointing) -> None:
    """Make a layer a gradient-checkpointed one, whose weights are prefetched and evicted.

    The layer is one of a transformers model, of a number as the prefetcher counts; its ``forward``
    is wrapped, on this instance.
    """
    inner = layer.forward

    def forward(*arguments: Any, **options: Any) -> Any:
        call = LayerCall.of(arguments, options)
        if shared.inspect is not None:
            shared.inspect(number, call)
        trained = any(parameter.requires_grad for parameter in layer.parameters())
        if torch.is_grad_enabled() and (call.differentiable or trained):
            return _Layer(layer, inner, number, shared).compute(call.with_gradient())
        with _entered(shared.prefetcher, number, _FEW_TOKENS if shared.sparing else call.tokens):
            return _joined([part.run(inner) for part in call.groups(shared.rows_at_once)])

    layer.forward = forward


class _Layer:
    """A checkpointed layer, computed with gradients.

    It holds nothing of one computation, whose graph holds it: a circle would be let go late.
    """

    def __init__(
        self, layer: torch.nn.Module, inner: Callable[..., Any], number: int, shared: Checkpointing
    ) -> None:
        self._layer, self._inner, self._number, self._shared = layer, inner, number, shared

    def compute(self, call: LayerCall) -> Any:
        """Compute it; in the backward pass, gradient hooks enter and leave the layer."""
        shared, number = self._shared, self._number
        keep = shared.rows_at_once is None and shared.activation_budget.keeps(number, call.tokens)
        # The graph holds them for as long as it can be gone through; the hook on it must not.
        parts: WeakSet[_RecomputedTensors] = WeakSet()

        def enter(gradient: torch.Tensor) -> None:
            shared.prefetcher.enter_backward(number)

        def leave(gradient: torch.Tensor) -> None:
            for part in parts:
                part.clear()
            shared.prefetcher.leave_backward(number)

        if first := call.first_with_gradient():
            first[0].register_hook(leave)
        with _entered(shared.prefetcher, number, call.tokens or _FEW_TOKENS):
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
                result.register_hook(enter)
        return output

    def _forgotten(self, call: LayerCall) -> _RecomputedTensors:
        """Return the recomputed tensors of a call, with all that is needed to repeat it."""
        held = call.to_repeat()
        of_cpu, of_devices = rng_state(call.leaves)
        random = save_inputs([of_cpu])[0], of_devices
        return _RecomputedTensors(lambda: self._again(held, random))

    def _again(self, held: LayerCall, random: RngState) -> Sequence[torch.Tensor]:
        """Return the tensors that the backward pass needs."""
        shared = self._shared
        shared.prefetcher.enter_backward(self._number)
        with (
            restored_rng_state(random),
            torch.enable_grad(),
            leaving_out(self._unneeded()),
            _captured_tensors() as saved,
        ):
            held.repeated().run(self._inner)
        shared.activation_budget.count(saved, held.tokens)
        return saved

    def _unneeded(self) -> list[Matrix]:
        name = self._shared.unneeded.get(self._number)
        if name is None or has_forward_hooks(self._layer):
            return []
        return [self._layer.get_submodule(name).matrix]  # type: ignore[list-item]


@contextmanager
def _entered(prefetcher: LayerPrefetcher, number: int, tokens: int) -> Iterator[None]:
    """Have a layer's weights in memory while it is computed forward."""
    if tokens < _FEW_TOKENS and not torch.is_grad_enabled():
        yield
        return
    prefetcher.enter(number, 1)
    try:
        yield
    finally:
        prefetcher.leave(number)


def _joined(results: list[Any]) -> Any:
    """Concatenate the results of groups of rows."""
    if len(results) == 1:
        return results[0]
    flat = [trees.tree_flatten(result) for result in results]
    joined = [
        torch.cat(pieces) if torch.is_tensor(pieces[0]) else pieces[0]
        for pieces in zip(*(leaves for leaves, _ in flat), strict=True)
    ]
    return trees.tree_unflatten(joined, flat[0][1])


class _RecomputedTensors:
    """The saved tensors of one computation; `again` returns them, in order, when autograd asks."""

    def __init__(self, again: Callable[[], Sequence[torch.Tensor]]) -> None:
        self._again = again
        self._count = 0
        self._values: dict[int, torch.Tensor] = {}

    def saving(self) -> AbstractContextManager[Any]:
        """Forget what is saved for the backward pass while this lasts."""
        return torch.autograd.graph.saved_tensors_hooks(self._save, self._recall)

    def _save(self, tensor: torch.Tensor) -> Any:
        if isinstance(tensor, torch.nn.Parameter):
            return tensor
        self._count += 1
        return self._count - 1

    def _recall(self, saved: Any) -> torch.Tensor:
        if torch.is_tensor(saved):
            return saved
        if saved not in self._values:
            found = self._again()
            if len(found) != self._count:
                raise UnsupportedError(
                    f"a layer kept {self._count} tensors for its gradients, and when it was "
                    f"computed again {len(found)}: its class does not compute the same twice",
                    hint="give it the memory not to compute again: --activation-memory",
                )
            self._values = dict(enumerate(found))
        return self._values.pop(saved)

    def clear(self) -> None:
        """Drop recomputed tensors that were not used."""
        self._values.clear()


@contextmanager
def _captured_tensors() -> Iterator[list[torch.Tensor]]:
    """Collect the tensors that autograd saves, all but parameters, instead of saving them.

    The graph itself holds none of them, for as long as this is over and the list is gone.
    """
    found: list[torch.Tensor] = []

    def save(tensor: torch.Tensor) -> Any:
        if isinstance(tensor, torch.nn.Parameter):
            return tensor
        found.append(tensor.detach())
        return len(found) - 1

    def look(saved: Any) -> torch.Tensor:
        return saved if torch.is_tensor(saved) else found[saved]

    with torch.autograd.graph.saved_tensors_hooks(save, look):
        yield found


@dataclass(slots=True)
class ActivationBudget:
    """Memory budget for activations, which decides how many layers save theirs.

    Attributes
    ----------
    layers, budget : int
        Decoder layers, and bytes for the activations of all that keep them.
    counted, tokens : int
        Bytes that one layer keeps, 0 until it is known, and the tokens of the batch it was counted
        in.
    most : int
        Layers that kept theirs in the batch that kept the most.

    Examples
    --------
    >>> kept = ActivationBudget(layers=4, budget=4000)
    >>> kept.keeps(3, tokens=10)
    False
    >>> kept.counted, kept.tokens = 1000, 10
    >>> [kept.keeps(layer, tokens=10) for layer in range(4)]
    [False, False, True, True]
    >>> kept.keeps(1, tokens=5)
    True
    """

    layers: int
    budget: int = 0
    counted: int = 0
    tokens: int = 0
    most: int = 0

    def keeps(self, layer: int, tokens: int) -> bool:
        """Tell whether a layer keeps its activations of a batch of so many tokens."""
        if not self.counted or not tokens:
            return False
        kept = min(self.layers, int(self.budget // self.needed(tokens)))
        self.most = max(self.most, kept)
        return layer >= self.layers - kept

    def recomputes(self, tokens: int) -> bool:
        """Tell whether layers will always be recomputed, as far as is known."""
        if not self.budget:
            return True
        return self.counted > 0 and self.layers * self.needed(tokens) > self.budget

    def needed(self, tokens: int) -> float:
        """Return the bytes that one layer takes to keep its activations of so many tokens.

        With fewer than were counted a layer needs less in proportion at least; with more, at most
        by the square, as scores of all pairs of tokens do.
        """
        ratio = tokens / self.tokens
        return _IN_HEAP * self.counted * (ratio if ratio <= 1 else ratio * ratio)

    def count(self, saved: Sequence[torch.Tensor], tokens: int) -> None:
        """Count what a layer saved of a batch, without parameters, unless it is known."""
        if self.counted or not self.budget or not tokens:
            return
        storages = {s.data_ptr(): s.nbytes() for s in map(torch.Tensor.untyped_storage, saved)}
        self.counted, self.tokens = sum(storages.values()), tokens
