"""The branches of a whole model, new or from an adapter; their parameters and statistics."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch

from loraformat.errors import InputError, UnsupportedError, UsageError, nearest, printable
from loraformat.model.adapter import Adapter, LoraDelta
from loraformat.model.checkpoint import Checkpoint
from loraformat.ops.deltas.factors import load_finite
from loraformat.tensors.torch_arrays import tensor_of
from loraformat.train.lora.branch import Factors, LoraBranch, branch_of
from loraformat.train.lora.initialise import initial
from loraformat.train.lora.options import LoraOptions
from loraformat.train.lora.target_modules import TargetModule, resolve

__all__ = ["attach", "attach_adapter", "extra_state", "load_extra_state", "trainable"]


def attach(
    targets: Sequence[TargetModule],
    options: LoraOptions,
    *,
    original: Checkpoint | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, LoraBranch]:
    """Give the layers that are to be trained their branches; returns them in the model's order.

    `targets` are all that the model has, in its order; `original` is the dense model, for
    ``init="loftq"``. `progress` is called with branches made and in total: principal directions
    take their time.

    Raises
    ------
    UsageError
        If a target means nothing, or cannot be trained so.
    """
    ranks = resolve(targets, options)
    for target in targets:
        if options.dora and target.is_parameter and target.name in ranks:
            raise UsageError(
                f"PEFT adapts {printable(target.name)} as a parameter (experts, routers, and in "
                "some families what is called like experts), for which it has no DoRA",
                hint="target the other linears (attention, for example), or leave DoRA out",
            )
    branches: dict[str, LoraBranch] = {}
    for target in targets:
        if (rank := ranks.get(target.name)) is None:
            continue
        branch = branch_of(
            target, initial(target, rank, options, original), options.scaling(rank),
            dropout=options.dropout, dora=options.dora, collecting=options.statistics,
        )  # fmt: skip
        target.attach(branch)
        branches[target.name] = branch
        progress(len(branches), len(ranks))
    return branches


def trainable(branches: Mapping[str, LoraBranch]) -> dict[str, torch.nn.Parameter]:
    """Return everything that is trained, by module and PEFT's key, in a stable order."""
    return {
        f"{name}.{key}": parameter
        for name, branch in branches.items()
        for key, parameter in branch.named().items()
    }


def extra_state(branches: Mapping[str, LoraBranch]) -> dict[str, torch.Tensor]:
    """Return the sums of the second moments: float64, and additive over processes."""
    return {
        f"{name}.moments.{key}": value
        for name, branch in branches.items()
        if branch.collecting
        for key, value in branch.moments.state().items()
    }


def load_extra_state(branches: Mapping[str, LoraBranch], state: Mapping[str, torch.Tensor]) -> None:
    """Take over what `extra_state` returned.

    Raises
    ------
    InputError
        If it is not that of these branches.
    """
    wanted = extra_state(branches)
    both = wanted.keys() & state.keys()
    odd = sorted(wanted.keys() ^ state.keys())
    odd += [name for name in both if wanted[name].shape != state[name].shape]
    if odd:
        raise InputError(f"the saved statistics are not those of this adapter: {printable(odd[0])}")
    for name, branch in branches.items():
        if branch.collecting:
            branch.moments.load(state[f"{name}.moments.total"], state[f"{name}.moments.count"])


def attach_adapter(
    targets: Sequence[TargetModule],
    adapter: Adapter,
    options: LoraOptions | None = None,
    *,
    has_replaced: bool = False,
) -> dict[str, LoraBranch]:
    """Give a model the branches of an adapter, to compute with it or to continue its training.

    `targets` are all that the model has; the adapter was opened against the base, and made for it.
    Of the options only dropout and statistics count: all else is as in the adapter. With
    `has_replaced` the model has what the adapter replaces, see
    `loraformat.train.lora.replaced_weights`.

    Raises
    ------
    InputError
        If its modules are not the model's.
    UnsupportedError
        If it is more than low-rank deltas.
    """
    _check_kind(adapter, has_replaced)
    by_weight = {target.weight_name: target for target in targets}
    by_stored = {target.stored_name: target for target in targets}
    found: dict[str, tuple[TargetModule, LoraDelta]] = {}
    for weight, delta in adapter.deltas.items():
        target = by_weight.get(weight) or by_stored.get(adapter.spellings.get(weight, weight))
        if target is None:
            raise InputError(
                f"changes {printable(weight)}, which this model has no branch for"
                + nearest(weight, list(by_weight)),
                path=adapter.path,
                hint="was it made for another base?",
            )
        if target.shared:
            raise UnsupportedError(
                f"changes {printable(weight)}, a weight shared by several layers: PEFT adapts "
                "only the layer that is named, but a delta of the weight would change all of them",
                path=adapter.path,
                hint="use it in PEFT; or train one without such layers, as all-linear does",
            )
        if delta.magnitude is not None and target.is_parameter:
            raise UnsupportedError(
                f"has a magnitude of {printable(weight)}, which PEFT adapts as a parameter",
                path=adapter.path,
            )
        _check_shapes(target, delta, adapter)
        found[target.name] = target, delta
    branches = {}
    for target in targets:
        if target.name in found:
            branch = branches[target.name] = _branch(*found[target.name], options or LoraOptions())
            target.attach(branch)
    return branches


def _check_kind(adapter: Adapter, has_replaced: bool) -> None:
    problem = None
    if adapter.invocation_tokens:
        problem = "acts on some tokens only (aLoRA)"
    elif adapter.replacements and not has_replaced:
        problem = f"replaces {printable(next(iter(adapter.replacements)))} as a whole"
    elif adapter.rows and not has_replaced:
        problem = f"replaces rows of {printable(next(iter(adapter.rows)))}"
    elif any(d.magnitude is not None and len(d.a.shape) == 3 for d in adapter.deltas.values()):
        problem = "has magnitudes of fused experts"
    elif any(delta.bias is not None for delta in adapter.deltas.values()):
        problem = "has biases of its own (lora_bias)"
    if problem:
        raise UnsupportedError(
            f"{problem}, and only low-rank deltas can be trained on a bundle",
            path=adapter.path,
            hint="merge it into its base, convert that to a bundle, and train a new adapter on it",
        )


def _check_shapes(target: TargetModule, delta: LoraDelta, adapter: Adapter) -> None:
    leading = (target.experts,) if target.experts else ()
    a = (*leading, delta.rank, target.in_features)
    b = (*leading, target.out_features, delta.rank)
    if (delta.a.shape, delta.b.shape) != (a, b):
        raise InputError(
            f"{printable(delta.target)}: A {list(delta.a.shape)} and B {list(delta.b.shape)}, "
            f"wanted {list(a)} and {list(b)}",
            path=adapter.path,
            hint="was it made for another base?",
        )


def _branch(target: TargetModule, delta: LoraDelta, options: LoraOptions) -> LoraBranch:
    factors = Factors(
        tensor_of(load_finite(delta.a)).float(), tensor_of(load_finite(delta.b)).float()
    )
    if not math.isfinite(delta.scaling):
        raise InputError(f"the scaling of {printable(delta.target)} is {delta.scaling}")
    branch = branch_of(
        target, factors, delta.scaling, dropout=options.dropout, dora=delta.magnitude is not None,
        collecting=options.statistics,
    )  # fmt: skip
    if delta.magnitude is not None and branch.magnitude is not None:
        with torch.no_grad():
            branch.magnitude.copy_(tensor_of(load_finite(delta.magnitude)).view(-1))
    return branch
