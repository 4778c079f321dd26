"""Checks of a model's class by a trial of a few tokens, before any other work is done.

A class of transformers may compute in a way that this engine does not know: with a weight of its
own accord, or with state that layers share in a place that nobody sees. So it is tried, on
stand-ins for its weights, which cost nothing and read nothing:

- it computes at all, positions counted from 0, and logits from its last hidden states;
- with checkpointed layers, or in groups of rows, it computes the same as by plain autograd: the
  hidden states, and the gradients of what goes into the first layer and of what is trained there.
  Whatever a layer gets from an earlier one it gets from the first, so a path that is lost anywhere
  is missing there.

The trial also finds products that a recomputed layer can leave out (see
`loraformat.train.engine.unneeded_products`).

With packing, samples that share a row must be kept apart. transformers makes block-diagonal masks
of positions that begin anew, in most of its classes. In one that does not, or in a layer that
carries a state from token to token, samples would see each other and nothing would tell. So each
layer's mask is looked at once (`Trial.packing`), and the first packed batch is refused there.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from typing import Any

import torch

from loraformat.errors import LoraFormatError, UnsupportedError, printable
from loraformat.train.batch import Batch
from loraformat.train.engine.checkpointing import ActivationBudget, Checkpointing
from loraformat.train.engine.cross_entropy import own_logits
from loraformat.train.engine.experts import ExpertStack
from loraformat.train.engine.layer_call import LayerCall, restored_rng_state, rng_state
from loraformat.train.engine.layer_prefetch import LayerPrefetcher
from loraformat.train.engine.linear import FrozenLinear
from loraformat.train.engine.matrix import StandInMatrix
from loraformat.train.engine.meta_model import (
    WeightNotInMemoryError,
    decoder_of,
    find_layers,
    text_config,
)
from loraformat.train.engine.unneeded_products import find_unneeded_products, last_products

__all__ = ["Trial"]

#: Positions in a row, and rows where they go through layers one by one.
_TOKENS = 8
_ROWS = 2
#: Relative difference of gradients; equal bits but for a GPU, which adds in any order.
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
_COARSE = 3e-2
_PLENTY = 1 << 60
#: Numbers in weights that are taken into memory because a class computes with them itself: 64 MB.
_MOST_HELD = 1 << 24
_NOT_COMPUTED = "cannot be computed with its weights on the disk"

#: Kinds of layers, as configs name them, that carry nothing on but what a mask lets through.
_MASKED = {"full_attention", "sliding_attention", "chunked_attention"}


class Trial:
    """Trial of a model, its layers wrapped and its linears mapped, on stand-ins for its weights."""

    def __init__(self, model: Any, shared: Checkpointing, path: object) -> None:
        self._model, self._shared, self._path = model, shared, path
        self._layers = find_layers(model, path)[1]
        self._passed: set[bool] = set()
        self._searched = self._kept_apart = False

    def forward(self) -> None:
        """Compute a few tokens, without gradients, as in training and as afterwards.

        Raises
        ------
        UnsupportedError
            If its class cannot, or needs weights for it that stay on the disk.
        """
        room = _MOST_HELD
        while True:
            try:
                with self._set_up(ActivationBudget(0)), torch.no_grad():
                    ids = self._any_tokens()
                    self._hidden(ids)
                    for some in (ids, ids.flip(1)):  # whichever of them is the padding
                        self._check_places(some)
                    self._check_head(ids)
                return
            except WeightNotInMemoryError as error:
                room -= self._held(error, room)
            except Exception as error:
                raise self._refusal(_NOT_COMPUTED, error) from error

    def _held(self, wanted: WeightNotInMemoryError, room: int) -> int:
        """Take a small weight into memory that the class computes with itself; returns its size."""
        named = (m for m in self._model.modules() if isinstance(m, FrozenLinear))
        linear = next((m for m in named if m.name == wanted.module and m.shown is None), None)
        size = 0 if linear is None else linear.in_features * linear.out_features
        if linear is None or size > room:
            raise self._refusal(_NOT_COMPUTED, wanted) from wanted
        linear.load_weight()
        return size

    def _check_places(self, ids: torch.Tensor) -> None:
        """Refuse a class that counts positions in its own way, as RoBERTa's does."""
        with self._drawing_alike(in_groups=True):
            found = self._hidden(ids)
            own = decoder_of(self._model)(input_ids=ids, use_cache=False).last_hidden_state
        if not _alike(own, found):
            raise UnsupportedError(
                f"{printable(type(self._model).__name__)} counts positions in a way of its own, "
                "which is not supported",
                path=f"{self._path}",
            )

    def _check_head(self, ids: torch.Tensor) -> None:
        """Refuse a class whose logits are made from more than its last hidden states."""
        with self._drawing_alike(in_groups=True):
            whole = self._model(input_ids=ids, use_cache=False).logits
            try:
                own = own_logits(self._model, self._hidden(ids)[0])
                same = _alike(whole.flatten(0, -2), own)
            except WeightNotInMemoryError:
                raise
            except Exception:  # it looks for what else its decoder returns
                same = False
        if not same:
            raise UnsupportedError(
                f"{printable(type(self._model).__name__)} computes its logits from more than its "
                "last hidden states, which is not supported",
                path=f"{self._path}",
            )

    def gradients(self, ids: torch.Tensor, rows_at_once: int | None = None) -> None:
        """Compare gradients the first time that a model is trained, and find unneeded products.

        `ids` are those of a batch, int64 (rows, tokens); with `rows_at_once` rows go through a
        layer in groups.

        Raises
        ------
        UnsupportedError
            If they differ.
        """
        in_groups = rows_at_once is not None
        if in_groups not in self._passed:
            some = ids[:1, :_TOKENS].repeat(_ROWS, 1)
            some[1] = some[1].flip(0)
            with self._drawing_alike(in_groups):
                self._compare(some, in_groups)
            self._passed.add(in_groups)
        recomputes = in_groups or self._shared.activation_budget.recomputes(ids.numel())
        if recomputes and not self._searched:
            self._shared.unneeded = self._find_unneeded()
            self._searched = True

    def _compare(self, ids: torch.Tensor, in_groups: bool) -> None:
        state = rng_state([ids])
        try:
            with restored_rng_state(state):
                plain = self._of(ids, _PLENTY)
        except Exception as error:
            raise self._refusal(_NOT_COMPUTED, error) from error
        try:
            with restored_rng_state(state):
                again = self._of(ids, 0, 1 if in_groups else None)
        except Exception as error:
            raise self._lost(in_groups, error) from error
        if not all(map(_alike, plain, again)):
            raise self._lost(in_groups)

    def _find_unneeded(self) -> dict[int, str]:
        """Return the products that need not be recomputed, each by its layer."""
        ids = self._any_tokens()
        state = rng_state([ids])

        def gradients(left_out: Mapping[int, str]) -> Sequence[torch.Tensor | None]:
            with restored_rng_state(state):
                return self._of(ids, 0, left_out=left_out)

        with (
            restored_rng_state(state),
            self._set_up(ActivationBudget(0)),
            torch.no_grad(),
            last_products(self._layers, FrozenLinear) as candidates,
        ):
            self._hidden(ids)
        return find_unneeded_products(self._layers, candidates, gradients)

    @contextmanager
    def _drawing_alike(self, in_groups: bool) -> Iterator[None]:
        """Drop nothing out where rows, one by one, draw other random numbers than all at once."""
        training = [module for module in self._model.modules() if module.training]
        if in_groups:
            self._model.eval()
        try:
            yield
        finally:
            for module in training:
                module.training = True

    def _of(
        self,
        ids: torch.Tensor,
        budget: int,
        rows: int | None = None,
        left_out: Mapping[int, str] | None = None,
    ) -> list[torch.Tensor | None]:
        """Return hidden states, and gradients of the first layer; or of all, without products."""
        kept = ActivationBudget(len(self._layers), budget=budget, counted=1, tokens=1)
        with self._set_up(kept, rows), torch.enable_grad(), _watched_input(self._model) as seen:
            hidden = self._hidden(ids)
            weights = torch.linspace(-1, 1, hidden.numel(), device=hidden.device)
            total = (hidden * weights.view_as(hidden).to(hidden.dtype)).sum()
            trained = _trained(self._layers)
            if left_out is not None:
                self._shared.unneeded = dict(left_out)
                wanted = [*seen, *(parameter for some in trained for parameter in some)]
            else:
                wanted = [*seen, *next(filter(None, trained), [])]
            found = torch.autograd.grad(total, wanted, allow_unused=True) if wanted else ()
        return [hidden.detach(), *found]

    def _hidden(self, ids: torch.Tensor) -> torch.Tensor:
        places = torch.arange(ids.shape[1], device=ids.device).repeat(len(ids), 1)
        decoder = decoder_of(self._model)
        output: torch.Tensor = decoder(
            input_ids=ids, position_ids=places, use_cache=False
        ).last_hidden_state
        return output

    @contextmanager
    def _set_up(self, kept: ActivationBudget, rows: int | None = None) -> Iterator[None]:
        """Compute layers on stand-ins inside this block, with no lasting effect."""
        shared = self._shared
        nowhere = LayerPrefetcher([[]] * len(self._layers), prefetch=False, release=False)
        trial = Checkpointing(nowhere, kept, rows)
        with ExitStack() as restoring, _standing_in(self._model):
            for name in (entry.name for entry in fields(shared)):
                restoring.callback(setattr, shared, name, getattr(shared, name))
                setattr(shared, name, getattr(trial, name))
            yield

    def _any_tokens(self) -> torch.Tensor:
        known = int(getattr(self._model.get_input_embeddings(), "num_embeddings", 1))
        linears = (m for m in self._model.modules() if isinstance(m, FrozenLinear))
        device = next((linear.device for linear in linears), None)
        return torch.arange(_TOKENS, device=device)[None] % known

    def _refusal(self, problem: str, error: Exception) -> LoraFormatError:
        if isinstance(error, LoraFormatError):
            error.path = error.path or f"{self._path}"
            return error
        said = " ".join(f"{type(error).__name__}: {error}".split())
        return UnsupportedError(
            f"{printable(type(self._model).__name__)} {problem}: {printable(said)}",
            path=f"{self._path}",
        )

    def _lost(self, in_groups: bool, error: Exception | None = None) -> LoraFormatError:
        """Return the refusal of a class whose layers share what is not carried."""
        name = printable(type(self._model).__name__)
        how = "in groups of rows" if in_groups else "again, layer by layer,"
        hint = "train it without rows at once (no --layer-major)" if in_groups else (
            "train it with PEFT, which keeps all activations; the adapter can be converted and "
            "merged here"
        )  # fmt: skip
        more = "" if error is None else f" ({printable(' '.join(str(error).split()))})"
        return UnsupportedError(
            f"{name} cannot be trained: computed {how} its gradients are not those of plain "
            f"autograd, for its layers share state in an unsupported way{more}",
            path=f"{self._path}",
            hint=hint,
        )

    @contextmanager
    def packing(self, batch: Batch) -> Iterator[None]:
        """Check attention masks while a batch goes through the layers, if it is the first packed.

        Raises
        ------
        UnsupportedError
            If a layer lets tokens see another sample's.
        """
        if self._kept_apart or not bool((batch.segments > 1).any()):
            yield
            return
        kinds = set(getattr(text_config(self._model.config), "layer_types", None) or ())
        if strange := sorted(kinds - _MASKED):
            raise self._unpacked(
                f"its layers of type {printable(', '.join(strange))} carry a state"
            )
        if getattr(self._model, "_is_stateful", False):
            raise self._unpacked("it carries a state from token to token")
        segments = batch.segments
        foreign = (segments[:, :, None] != segments[:, None, :]) & (segments > 0)[:, :, None]

        def inspect(number: int, call: LayerCall) -> None:
            masks = [x for x in call.leaves if torch.is_tensor(x) and _is_mask(x, foreign)]
            if not masks or bool((_lets_through(masks[0]) & foreign[:, None]).any()):
                raise self._unpacked(f"its layer {number} does not mask other samples")

        self._shared.inspect = inspect
        try:
            yield
        finally:
            self._shared.inspect = None
        self._kept_apart = True

    def _unpacked(self, reason: str) -> UnsupportedError:
        name = printable(type(self._model).__name__)
        return UnsupportedError(
            f"samples cannot be packed into one row in {name}: {reason}",
            path=f"{self._path}",
            hint="train with one sample in each row",
        )


def _alike(plain: torch.Tensor | None, again: torch.Tensor | None) -> bool:
    if plain is None or again is None:
        return plain is again
    tolerance = _TOLERANCE.get(plain.dtype, _COARSE)
    largest = float(plain.nan_to_num().abs().max())
    return plain.shape == again.shape and torch.allclose(
        plain, again, rtol=tolerance, atol=tolerance * largest, equal_nan=True
    )


def _trained(layers: Sequence[torch.nn.Module]) -> list[list[torch.nn.Parameter]]:
    """Return what is trained in each layer."""
    return [[p for p in layer.parameters() if p.requires_grad] for layer in layers]


@contextmanager
def _watched_input(model: Any) -> Iterator[list[torch.Tensor]]:
    """Give what is embedded a gradient of its own; yields it once it is computed."""
    seen: list[torch.Tensor] = []

    def watch(module: Any, arguments: Any, output: torch.Tensor) -> torch.Tensor:
        seen.append(output.detach().requires_grad_())
        return seen[-1] * 1  # which a class may change in place

    handle = model.get_input_embeddings().register_forward_hook(watch)
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def _standing_in(model: torch.nn.Module) -> Iterator[None]:
    """Replace the weights of all linears and experts by stand-ins inside this block.

    No branch collects anything meanwhile, and no hook of anybody's sees it.
    """
    with ExitStack() as restoring:
        for module in model.modules():
            for hooks in ("_forward_hooks", "_forward_pre_hooks"):
                if before := getattr(module, hooks):
                    restoring.callback(setattr, module, hooks, before)
                    setattr(module, hooks, OrderedDict())
            if getattr(module, "collecting", False):
                restoring.callback(setattr, module, "collecting", True)
                module.collecting = False  # type: ignore[assignment]
            if isinstance(module, FrozenLinear):
                restoring.callback(setattr, module, "matrix", module.matrix)
                module.matrix = StandInMatrix(module.matrix)
            elif isinstance(module, ExpertStack):
                restoring.callback(setattr, module, "experts", module.experts)
                module.experts = [[StandInMatrix(m) for m in parts] for parts in module.experts]
        yield


def _is_mask(tensor: torch.Tensor, foreign: torch.Tensor) -> bool:
    return tensor.dim() == 4 and tensor.shape[-2:] == foreign.shape[-2:]


def _lets_through(mask: torch.Tensor) -> torch.Tensor:
    """Return where a mask lets a token see another; it is boolean, or added to the scores."""
    if mask.dtype == torch.bool:
        return mask
    return mask > torch.finfo(mask.dtype).min / 2
