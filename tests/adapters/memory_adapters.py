"""Adapters and models in memory, and their effect as dense matrices."""

from dataclasses import replace
from pathlib import Path

import torch

from loraformat.model.adapter import Adapter, LoraDelta
from loraformat.testing import dense
from tests.torch_tensors import numbers

LAYER = "model.layers.{}.self_attn.{}.weight"


def delta(target, b, a, scaling=1.0, **members):
    return LoraDelta(target, dense(f"{target}.A", a), dense(f"{target}.B", b), scaling, **members)


def adapter(*deltas, **members):
    return Adapter(Path("memory"), "memory", {d.target: d for d in deltas}, **members)


def random_adapter(seed=0, ranks=(6, 6, 4, 8), scalings=(1.0, 2.0, 0.5, -3.0), decay=1.0):
    """Four modules of two shapes, each with its own rank and scaling, as patterns make them."""
    random = torch.Generator().manual_seed(seed)
    deltas = []
    for i, (r, s) in enumerate(zip(ranks, scalings, strict=True)):
        out, inner = ((24, 16), (16, 40))[i % 2]
        weights = torch.arange(1, r + 1) ** -decay
        b = torch.randn(out, r, generator=random) * weights
        a = torch.randn(r, inner, generator=random)
        name = LAYER.format(i // 2, ("q_proj", "v_proj")[i % 2])
        deltas.append(delta(name, b, a, s))
    return adapter(*deltas)


def effect(change):
    """D of a delta, in float64."""
    return change.scaling * numbers(change.b).double() @ numbers(change.a).double()


def effects(whole):
    return {target: effect(change) for target, change in whole.deltas.items()}


def distance(one, other):
    return float((one - other).norm() / other.norm())


def in_memory(whole):
    """An adapter that needs no file any more."""
    deltas = {
        name: replace(
            change,
            a=dense("a", numbers(change.a).clone()),
            b=dense("b", numbers(change.b).clone()),
        )
        for name, change in whole.deltas.items()
    }
    return replace(whole, deltas=deltas)
