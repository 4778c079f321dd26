"""The loss of the output head: in chunks of tokens and blocks of the vocabulary, with its rule."""

import pytest
import torch

from loraformat.train import load
from loraformat.train.engine import cross_entropy, layer_prefetch, matmul
from loraformat.train.engine.cross_entropy import HeadRule, frozen_head_loss, own_head_loss
from loraformat.train.engine.linear import FrozenLinear
from loraformat.train.engine.matrix import DenseMatrix
from tests.train.engine.reference import dense_loss, make_batch, merged_weights, relative

RULES = [
    HeadRule(), HeadRule(scale=0.125), HeadRule(cap=3.0), HeadRule(before=0.5, scale=2.0, cap=5.0),
]  # fmt: skip


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(cross_entropy, "_LOGITS", 1600)
    monkeypatch.setattr(cross_entropy, "_CACHED", 96)
    monkeypatch.setattr(matmul, "_BLOCK", 2048)
    monkeypatch.setattr(matmul, "_ALIGNED_ROWS", 16)
    monkeypatch.setattr(matmul, "_FEW", 0)
    monkeypatch.setattr(layer_prefetch, "_STRETCH", 1024)
    monkeypatch.setattr(layer_prefetch, "_FEWEST_ROWS", 16)


def logits_of(hidden, weight, bias, rule):
    z = (hidden * rule.before) @ weight.T + (0 if bias is None else bias)
    z = z * rule.scale
    return z if rule.cap is None else rule.cap * torch.tanh(z / rule.cap)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bias", [None, torch.linspace(-2, 2, 130)])
def test_loss_and_gradient_are_those_of_the_plain_formula(rule, bias):
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(130, 24, generator=random)
    targets = torch.randint(0, 130, (11,), generator=random)
    hidden = torch.randn(11, 24, generator=random).requires_grad_()
    head = FrozenLinear(DenseMatrix(weight), "lm_head", bias)
    loss = frozen_head_loss(hidden, targets, head, rule)
    (2 * loss).backward()
    exact = hidden.detach().double().requires_grad_()
    logits = logits_of(exact, weight.double(), bias, rule)
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    (2 * expected).backward()
    assert loss.dtype == torch.float32
    assert relative(loss.detach(), expected.detach()) < 1e-6
    assert relative(hidden.grad, exact.grad) < 2e-6
    with torch.no_grad():
        assert frozen_head_loss(hidden, targets, head, rule) == loss


def test_large_logits_neither_overflow_nor_vanish():
    head = FrozenLinear(DenseMatrix(torch.tensor([[1e4], [-1e4], [0.0]])), "lm_head")
    hidden = torch.ones(2, 1, requires_grad=True)
    loss = frozen_head_loss(hidden, torch.tensor([0, 1]), head, HeadRule())
    loss.backward()
    assert loss.item() == pytest.approx(2e4)
    assert torch.equal(hidden.grad, torch.tensor([[0.0], [2e4]]))


def test_a_trained_head_gets_the_gradients_of_the_plain_formula():
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(50, 8, generator=random).requires_grad_()
    hidden = torch.randn(7, 8, generator=random).requires_grad_()
    targets = torch.randint(0, 50, (7,), generator=random)
    loss = own_head_loss(hidden, targets, lambda x: x @ weight.T, 50, [weight])
    found = torch.autograd.grad(loss, [hidden, weight])
    logits = hidden @ weight.T
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    wanted = torch.autograd.grad(expected, [hidden, weight])
    assert relative(loss.detach(), expected.detach()) < 1e-6
    for one, other in zip(found, wanted, strict=True):
        assert relative(one, other) < 1e-6


@pytest.mark.parametrize(
    "architecture, rule",
    [
        ("llama", HeadRule()),
        ("gemma2", HeadRule(cap=30.0)),
        ("cohere", HeadRule(scale=0.0625)),
        ("granite", HeadRule(scale=0.125)),
    ],
)
def test_a_class_is_asked_for_its_rule(bundle_of, architecture, rule):
    with load(bundle_of(architecture)) as model:
        assert model._head_rule == rule


def test_a_class_without_a_known_rule_keeps_its_own_forward(opened, attach, monkeypatch):
    model, dense = opened("gemma2")
    attach(model)
    batch = make_batch()
    monkeypatch.setattr(model, "_head_rule", None)
    loss = model.loss(batch)
    loss.backward()
    factors, weights = merged_weights(model, dense)
    expected = dense_loss(dense, batch, weights)
    expected.backward()
    assert relative(loss.detach(), expected.detach()) < 1e-6
    for name, (a, _) in factors.items():
        found = model.base.get_submodule(name).branch.a.grad
        assert relative(found, a.grad) < 1e-5, name
