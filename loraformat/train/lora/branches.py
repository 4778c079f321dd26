"""The branches of a whole model: made, named, and carried over a restart."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from loraformat.errors import InputError, UsageError, printable
from loraformat.model.checkpoint import Checkpoint
from loraformat.train.lora.branch import LoraBranch, branch_of
from loraformat.train.lora.initialise import initial
from loraformat.train.lora.options import LoraOptions
from loraformat.train.lora.target_module import TargetModule
from loraformat.train.lora.target_selection import resolve

__all__ = ["attach", "extra_state", "load_extra_state", "trainable"]


def attach(
    sites: Sequence[TargetModule],
    options: LoraOptions,
    *,
    original: Checkpoint | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, LoraBranch]:
    """Give the layers that are to be trained their branches.

    Parameters
    ----------
    sites : sequence of Site
        All that the model has, in its order.
    options : LoraOptions
    original : Checkpoint, optional
        The dense model, for ``init="loftq"``.
    progress : callable
        Called with branches made and in total: principal directions take their time.

    Returns
    -------
    dict of str to LoraBranch
        By the site's name, in the model's order.

    Raises
    ------
    UsageError
        If a target means nothing, or cannot be trained so.
    """
    ranks = resolve(sites, options)
    if options.dora:
        _check_dora(site for site in sites if site.name in ranks)
    branches: dict[str, LoraBranch] = {}
    for site in sites:
        if (rank := ranks.get(site.name)) is None:
            continue
        branch = branch_of(
            site,
            initial(site, rank, options, original),
            options.scaling(rank),
            dropout=options.dropout,
            dora=options.dora,
            collecting=options.statistics,
        )
        site.attach(branch)
        branches[site.name] = branch
        progress(len(branches), len(ranks))
    return branches


def _check_dora(sites: Iterable[TargetModule]) -> None:
    for site in sites:
        if site.is_parameter:
            raise UsageError(
                f"PEFT adapts {printable(site.name)} as a parameter (experts, routers, and in some "
                "families what is called like experts), for which it has no DoRA",
                hint="target the other linears (attention, for example), or leave DoRA out",
            )


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
    odd = sorted(wanted.keys() ^ state.keys())
    odd += [
        name for name in wanted.keys() & state.keys() if wanted[name].shape != state[name].shape
    ]
    if odd:
        raise InputError(f"the saved statistics are not those of this adapter: {printable(odd[0])}")
    for name, branch in branches.items():
        if branch.collecting:
            branch.moments.load(state[f"{name}.moments.total"], state[f"{name}.moments.count"])
