"""A plain low-rank branch, batches, and what a dense model makes of them."""

from __future__ import annotations

import torch

from loraformat.train.batch import Batch
from loraformat.train.engine.experts import ExpertStack
from loraformat.train.engine.linear import FrozenLinear, LoraFactors
from tests.tiny_models import VOCABULARY


class Branch(torch.nn.Module):
    """y + B A x, for a linear or for each expert of a stack."""

    def __init__(self, module, seed):
        super().__init__()
        random = torch.Generator().manual_seed(seed)
        count = getattr(module, "count", 1)
        self.a = torch.nn.Parameter(
            0.1 * torch.randn(count, 4, module.in_features, generator=random)
        )
        self.b = torch.nn.Parameter(
            0.1 * torch.randn(count, module.out_features, 4, generator=random)
        )

    def pair(self, expert=0):
        return LoraFactors(self.a[expert], self.b[expert], 1.0)

    def forward(self, x, y, expert=0):
        return (y + (x.to(self.a.dtype) @ self.a[expert].T) @ self.b[expert].T).to(y.dtype)


def places(model):
    return {
        name: module
        for name, module in model.base.named_modules()
        if isinstance(module, (FrozenLinear, ExpertStack)) and module.layer is not None
    }


def factors_of(model, dtype=torch.float32):
    """Return copies of A and B of each branch, which can be differentiated."""
    return {
        name: tuple(
            x.detach().to(dtype, copy=True).requires_grad_()
            for x in (module.branch.a, module.branch.b)
        )
        for name, module in places(model).items()
        if module.branch is not None
    }


def merged_weights(model, dense, factors=None):
    """Return the factors of each branch, and the dense model's weights with B A added."""
    factors, weights = factors or factors_of(model), {}
    for name, (a, b) in factors.items():
        module = places(model)[name]
        delta = b @ a
        if isinstance(module, ExpertStack):
            target, delta = name, delta.mT if module.in_out_layout else delta
        else:
            target, delta = f"{name}.weight", delta[0].T if module.conv1d else delta[0]
        weights[target] = dense.get_parameter(target) + delta
    return factors, weights


def dense_logits(dense, batch, weights=None):
    options = {"input_ids": batch.input_ids, "use_cache": False}
    return torch.func.functional_call(dense, weights or {}, (), options).logits


def dense_loss(dense, batch, weights=None):
    logits = dense_logits(dense, batch, weights)[:, :-1]
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch.labels[:, 1:].flatten(), reduction="sum"
    )


def make_batch(rows=2, length=24, seed=0, vocabulary=VOCABULARY):
    """Rows of one sample each; some tokens, and every first one, are not learned."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocabulary, (rows, length), generator=random)
    labels = ids.clone()
    labels[:, 0] = -100
    labels[0, 5:9] = -100
    positions = torch.arange(length).expand(rows, length).contiguous()
    samples = tuple((row,) for row in range(rows))
    return Batch(ids, labels, positions, torch.ones_like(ids), samples)


def one_row(batches, padding=0):
    """Pack batches of one row each into one row."""
    ids, labels, positions = (
        torch.cat([getattr(batch, name) for batch in batches], 1)
        for name in ("input_ids", "labels", "position_ids")
    )
    segments = torch.cat([b.segments * (i + 1) for i, b in enumerate(batches)], 1)
    pad, end = torch.nn.functional.pad, (0, padding)
    return Batch(
        pad(ids, end, value=2), pad(labels, end, value=-100), pad(positions, end),
        pad(segments, end),
        (tuple(range(len(batches))),),
    )  # fmt: skip


def gradients(model):
    trained = {name: p for name, p in model.base.named_parameters() if p.requires_grad}
    return {name: p.grad.clone() for name, p in trained.items()}


def relative(found, wanted):
    return float((found - wanted).norm() / wanted.norm())
