"""P1, P2 and P8 of the parity protocol: losses, gradients and logits of a dense model."""

import pytest
import torch

from tests.train.engine.reference import (
    dense_logits,
    dense_loss,
    factors_of,
    gradients,
    make_batch,
    merged_weights,
    relative,
)

GRADIENTS = [
    "llama", "llama-tied", "mistral-window", "qwen2", "qwen3", "gemma2", "gemma3_text-pattern",
    "phi3", "gpt2", "mixtral", "qwen3_moe", "gpt_oss",
]  # fmt: skip
LOSSES = [
    "olmo2", "granite", "starcoder2", "stablelm", "cohere", "glm", "nemotron", "falcon", "gpt_neox",
    "phi", "opt", "bloom", "lfm2", "mamba",
    "nanochat", "electra",
]  # fmt: skip


@pytest.mark.parametrize("architecture", GRADIENTS)
def test_gradients_are_those_of_a_dense_model(opened, attach, architecture):
    model, dense = opened(architecture)
    attach(model)
    batch = make_batch()
    loss = model.loss(batch)
    loss.backward()
    factors, weights = merged_weights(model, dense)
    expected = dense_loss(dense, batch, weights)
    expected.backward()
    assert loss.dtype == torch.float32
    assert relative(loss.detach(), expected.detach()) < 1e-6
    found = gradients(model)
    assert len(found) == 2 * len(factors) > 0
    for name, (a, b) in factors.items():
        assert relative(found[f"{name}.branch.a"], a.grad) < 1e-5, name
        assert relative(found[f"{name}.branch.b"], b.grad) < 1e-5, name


@pytest.mark.parametrize("architecture", ["gpt2", "starcoder2", "phi"])
def test_gradients_are_finite_differences_in_float64(opened, attach, architecture):
    """P2: of two entries of A and two of B in each place; these classes compute in float64."""
    model, dense = opened(architecture)
    attach(model)
    batch = make_batch()
    model.loss(batch).backward()
    found, dense, chance = gradients(model), dense.double(), torch.Generator().manual_seed(0)
    factors = factors_of(model, torch.float64)

    def loss_at(factor, entry, value):
        before = factor[entry].item()
        factor[entry] = value
        loss = dense_loss(dense, batch, merged_weights(model, dense, factors)[1]).item()
        factor[entry] = before
        return loss

    step, compared = 1e-4, 0
    for name, pair in factors.items():
        for which, factor in zip("ab", pair, strict=True):
            gradient = found[f"{name}.branch.{which}"]
            for place in torch.randint(gradient.numel(), (2,), generator=chance):
                entry = tuple(int(i) for i in torch.unravel_index(place, factor.shape))
                with torch.no_grad():
                    middle = factor[entry].item()
                    ahead, behind = (loss_at(factor, entry, middle + h) for h in (step, -step))
                slope = (ahead - behind) / (2 * step)
                assert abs(gradient[entry] - slope) < 1e-5 * gradient.abs().max(), (name, which)
                compared += 1
    assert compared >= 20


@pytest.mark.parametrize("architecture", LOSSES)
def test_losses_are_those_of_a_dense_model(opened, architecture):
    model, dense = opened(architecture)
    batch = make_batch()
    with torch.no_grad():
        assert relative(model.loss(batch), dense_loss(dense, batch)) < 1e-6
        logits = model(input_ids=batch.input_ids).logits
        assert relative(logits, dense_logits(dense, batch)) < 1e-5


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral", "gemma2"])
def test_logits_are_those_of_the_dense_merge(opened, attach, architecture):
    model, dense = opened(architecture)
    attach(model)
    batch = make_batch()
    _, weights = merged_weights(model, dense)
    with torch.no_grad():
        found = model(input_ids=batch.input_ids).logits
        assert relative(found, dense_logits(dense, batch, weights)) < 1e-5
        without = dense_logits(dense, batch)
        assert relative(found, without) > 1e-2  # the branches do something


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_rows_at_once_change_nothing(opened, attach, architecture):
    model, _ = opened(architecture)
    attach(model)
    batch = make_batch(rows=3)
    found = {}
    for rows in (None, 1, 2):
        model.zero_grad()
        loss = model.loss(batch, rows_at_once=rows)
        loss.backward()
        found[rows] = loss.detach(), gradients(model)
    for rows in (1, 2):
        assert relative(found[rows][0], found[None][0]) < 1e-6
        for name, gradient in found[None][1].items():
            assert relative(found[rows][1][name], gradient) < 1e-5, name


def test_a_mean_loss_of_transformers_own_class(opened, attach):
    model, _ = opened("llama")
    attach(model)
    batch = make_batch()
    own = model(input_ids=batch.input_ids, labels=batch.labels)
    assert own.logits.shape == (*batch.input_ids.shape, 160)
    own.loss.backward()
    of_mean = gradients(model)
    model.zero_grad()
    model.loss(batch).backward()
    for name, gradient in gradients(model).items():
        assert relative(gradient / batch.trained, of_mean[name]) < 1e-5, name


def test_a_batch_without_learned_tokens_has_loss_zero_and_gradients_zero(opened, attach):
    model, _ = opened("llama")
    attach(model)
    batch = make_batch()
    batch.labels.fill_(-100)
    loss = model.loss(batch)
    loss.backward()
    assert loss.item() == 0
    assert all(not gradient.any() for gradient in gradients(model).values())


def test_dropout_is_drawn_again_as_it_was(opened, attach):
    model, _ = opened("gpt2")  # which drops a tenth of its attention and residuals
    attach(model).train()
    batch = make_batch()
    losses, found = [], []
    for _ in range(2):
        torch.manual_seed(5)
        model.zero_grad()
        loss = model.loss(batch)
        drawn = torch.rand(1)
        loss.backward()
        losses.append((loss.item(), drawn.item(), torch.rand(1).item()))
        found.append(gradients(model))
    assert losses[0] == losses[1]
    assert losses[0][0] != model.eval().loss(batch).item()
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name])
