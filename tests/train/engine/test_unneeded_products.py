"""What the backward pass does not need is not recomputed, and gradients are the same bits."""

from collections import Counter

import pytest
import torch

from loraformat.train import LoraOptions, load
from loraformat.train.engine import linear
from loraformat.train.engine.checkpointing import (
    ActivationBudget,
    Checkpointing,
    checkpoint_layer,
)
from loraformat.train.engine.experts import ExpertStack
from loraformat.train.engine.layer_prefetch import LayerPrefetcher
from loraformat.train.engine.linear import FrozenLinear
from loraformat.train.engine.matrix import NF4Matrix
from loraformat.train.engine.unneeded_products import find_unneeded_products, last_products
from tests import torch_codec as codec
from tests.train.engine.reference import make_batch


@pytest.fixture
def products(monkeypatch):
    """Counts forward products by their matrix."""
    counted, plain = Counter(), linear.multiply

    def count(x, matrix, dtype):
        counted[matrix] += 1
        return plain(x, matrix, dtype)

    monkeypatch.setattr(linear, "multiply", count)
    return counted


def gradients(bundle, budget, steps=1):
    torch.manual_seed(0)
    lora = LoraOptions(rank=4, init="orthogonal")
    with load(bundle, lora=lora, activation_memory=budget) as model:
        for _ in range(steps):
            model.zero_grad()
            torch.manual_seed(3)
            model.loss(make_batch()).backward()
        return model, {name: p.grad for name, p in model.trainable().items()}


@pytest.mark.parametrize(
    "architecture, unneeded",
    [
        ("llama", {"mlp.down_proj"}),
        ("gpt2", {"mlp.c_proj"}),  # dropped out first
        ("granite", {"mlp.down_proj"}),  # multiplied by a constant first
        ("gpt_neox", {"mlp.dense_4h_to_h"}),  # so is the attention's; the last is left out
        ("phi", {"mlp.fc2"}),
        ("falcon", {"mlp.dense_4h_to_h"}),  # the attention's is added to it in place
        ("gemma2", set()),  # normalised first
        ("qwen3_moe", set()),  # weighted by the router
    ],
)
def test_products_that_are_left_out(bundle_of, products, architecture, unneeded):
    model, found = gradients(bundle_of(architecture), 0)
    places = {
        name: module.matrix
        for name, module in model.base.named_modules()
        if isinstance(module, FrozenLinear) and module.layer is not None
    }
    for name, matrix in places.items():
        left_out = any(name.endswith(f".{end}") for end in unneeded)
        assert products[matrix] == (1 if left_out else 2), name
    stacks = [m for m in model.base.modules() if isinstance(m, ExpertStack)]
    assert all(products[e] in (0, 2) for s in stacks for parts in s.experts for e in parts)
    for name, gradient in gradients(bundle_of(architecture), 1 << 30, steps=2)[1].items():
        assert torch.equal(gradient, found[name]), name


class Layer(torch.nn.Module):
    def __init__(self, seed):
        super().__init__()
        chance = torch.Generator().manual_seed(seed)
        codes = [codec.quantize(torch.randn(64, 64, generator=chance) / 8) for _ in range(2)]
        self.one, self.two = (FrozenLinear(NF4Matrix(c.codes, (64, 64))) for c in codes)

    def inner(self, x):
        return self.two(torch.nn.functional.dropout(torch.tanh(self.one(x)), 0.3))


class Adds(Layer):
    def forward(self, x):
        return (x + self.inner(x),)


class Reads(Layer):
    def forward(self, x):
        return (x + torch.tanh(self.inner(x)),)


class ReadsBeside(Layer):
    """What it adds it returns something else of, too."""

    def forward(self, x):
        y = self.inner(x)
        return x + y, y.square().mean((1, 2))


class AddsTwice(Layer):
    def forward(self, x):
        y = self.inner(x)
        return (x + y + y,)


class AddsInPlace(Layer):
    def forward(self, x):
        y = self.inner(x)
        y += x
        return (y,)


class ReadsOnce(Layer):
    """Multiplies by one matrix twice, and only adds what comes of the second time."""

    def forward(self, x):
        return (x + self.two(self.inner(x)),)


class ReadsWithoutGradient(Layer):
    def factor(self, y):
        return y.square().mean()

    def forward(self, x):
        y = self.inner(x)
        with torch.no_grad():
            factor = self.factor(y)
        return (x + y * factor,)


class ReadsNumber(ReadsWithoutGradient):
    def factor(self, y):
        return y.square().mean().item()


class ReadsSigns(ReadsWithoutGradient):
    def factor(self, y):
        return (y > 0).to(y.dtype)


class ReadsToChoose(ReadsWithoutGradient):
    """By a factor that is finite and of many values, whatever the product is."""

    def factor(self, y):
        return torch.where(y > 0, torch.linspace(1, 2, y.shape[-1]), torch.linspace(3, 4, 64))


class MultipliesByNumber(ReadsWithoutGradient):
    def factor(self, y):
        return 0.5


LAYERS = [
    Adds, Reads, AddsInPlace, Adds, ReadsBeside, AddsTwice, ReadsOnce, ReadsWithoutGradient,
    ReadsNumber, AddsInPlace, ReadsSigns, MultipliesByNumber, ReadsToChoose, Reads, Adds,
]  # fmt: skip


def sharing():
    layers = len(LAYERS)
    return Checkpointing(LayerPrefetcher([[]] * layers), ActivationBudget(layers))


@pytest.mark.parametrize("rows_at_once", [None, 1])
def test_layers_unlike_one_another(products, rows_at_once):
    layers = [kind(seed) for seed, kind in enumerate(LAYERS)]
    shared = sharing()

    def gradients(left_out=()):
        shared.unneeded = dict(left_out)
        products.clear()
        torch.manual_seed(0)
        x = start = torch.linspace(-1, 1, 2 * 20 * 64).view(2, 20, 64).requires_grad_()
        beside = 0
        for layer in layers:
            x, *more = layer(x)
            beside = beside + sum(m.sum() for m in more)
        (x.square().sum() + beside).backward()
        return [start.grad]

    plain = gradients()
    for number, layer in enumerate(layers):
        checkpoint_layer(layer, number, shared)
    with torch.no_grad(), last_products(layers, FrozenLinear) as candidates:
        for layer in layers:
            layer(torch.ones(2, 20, 64))
    shared.rows_at_once = rows_at_once
    groups = 1 if rows_at_once is None else 2
    expected = gradients()  # rows draw their random numbers one by one
    assert [products[layer.two.matrix] for layer in layers] == [
        groups * (4 if kind is ReadsOnce else 2) for kind in LAYERS
    ]
    assert rows_at_once or torch.equal(*plain, *expected)
    left_out = find_unneeded_products(layers, candidates, gradients)
    assert torch.equal(*gradients(left_out), *expected)
    # A number of Python's is in the graph of the forward pass, and is not recomputed.
    once = (Adds, AddsTwice, AddsInPlace, MultipliesByNumber, ReadsNumber)
    times = {ReadsOnce: 4, **dict.fromkeys(once, 1)}
    assert [products[layer.two.matrix] for layer in layers] == [
        groups * times.get(kind, 2) for kind in LAYERS
    ]


class RefusesNaN(Layer):
    def forward(self, x):
        y = self.inner(x)
        assert not y.isnan().any()
        return (x + y,)


def test_a_class_that_refuses_what_is_not_there(products):
    layer, shared = RefusesNaN(0), sharing()
    checkpoint_layer(layer, 0, shared)

    def gradients(left_out):
        shared.unneeded = dict(left_out)
        torch.manual_seed(0)
        x = torch.ones(1, 20, 64, requires_grad=True)
        layer(x)[0].sum().backward()
        return [x.grad]

    assert find_unneeded_products([layer], {0: "two"}, gradients) == {}


def test_a_hook_inside_a_layer_sees_every_value():
    layer, shared, seen = Adds(0), sharing(), []
    shared.unneeded = {0: "two"}
    checkpoint_layer(layer, 0, shared)
    x = torch.linspace(-1, 1, 2 * 20 * 64).view(2, 20, 64).requires_grad_()
    for _ in range(2):
        layer(x)[0].sum().backward()
    layer.two.register_forward_hook(lambda module, inputs, y: seen.append(y.detach().clone()))
    layer(x)[0].sum().backward()
    assert len(seen) == 2 and torch.equal(*seen)
