"""Layers that keep their activations: the same bits, in the same order of layers, in a budget."""

import pytest
import torch

from loraformat.train import LoraOptions, load
from loraformat.train.engine.checkpointing import ActivationBudget
from tests.train.engine.reference import make_batch

PLENTY = 1 << 30


def step(bundle, budget, steps=2, **options):
    """Return loss and gradients of a step, after one in which activations are counted."""
    torch.manual_seed(3)
    lora = LoraOptions(rank=4, dropout=0.1, init="orthogonal")
    with load(bundle, lora=lora, activation_memory=budget, **options) as model:
        model.train()
        for _ in range(steps):
            for parameter in model.trainable().values():
                parameter.grad = None
            model.traffic.visits.clear()
            loss = model.loss(make_batch())
            loss.backward()
        gradients = {name: p.grad for name, p in model.trainable().items()}
        return (
            loss.detach(),
            gradients,
            model.layers_kept,
            model.traffic.visits,
            model.extra_state(),
        )


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "qwen3", "mixtral", "gpt_oss"])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_what_is_kept_changes_no_bit(bundle_of, architecture, compute):
    bundle = bundle_of(architecture)
    loss, gradients, kept, visits, state = step(bundle, 0, compute_dtype=compute)
    assert kept == 0 and all(g.abs().max() > 0 for g in gradients.values())
    other, others, most, again, other_state = step(bundle, PLENTY, compute_dtype=compute)
    assert most == len(visits) // 2 > 1
    assert torch.equal(loss, other) and again == visits
    for name, gradient in gradients.items():
        assert torch.equal(gradient, others[name]), name
    for name, value in state.items():
        assert torch.equal(value, other_state[name]), name


def test_as_many_of_the_last_layers_keep_theirs_as_the_budget_allows(bundle_of):
    bundle, computed = bundle_of("llama"), []
    with load(bundle, lora=LoraOptions(rank=2), activation_memory=PLENTY) as model:
        layers = model.base.model.layers
        for number, layer in enumerate(layers):
            layer.mlp.register_forward_hook(lambda *_, number=number: computed.append(number))
        count = len(layers)
        model.loss(make_batch()).backward()
        assert computed == [*range(count), *reversed(range(count))]
        counted = model._shared.activation_budget
        assert counted.counted > 0
        for budget, kept in ((counted.needed(counted.tokens) * 3 // 2, 1), (PLENTY, count)):
            computed.clear()
            model.activation_memory = budget
            model.loss(make_batch()).backward()
            assert computed == [*range(count), *reversed(range(count - kept))]
            assert model.layers_kept == kept


def test_what_is_counted_is_what_is_kept(bundle_of):
    """Tensors that a layer's graph holds, seen by their storages being alive."""
    with load(bundle_of("llama"), lora=LoraOptions(rank=2), activation_memory=PLENTY) as model:
        model.loss(make_batch()).backward()
        seen = {}

        def note(tensor):
            if not isinstance(tensor, torch.nn.Parameter):
                seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            model.loss(make_batch())
        counted, layers = model._shared.activation_budget.counted, len(model.base.model.layers)
    # Besides: what the embedding and the loss keep, and masks, which are counted for each layer.
    assert 0.8 * layers * counted < sum(seen.values()) < 1.3 * layers * counted


def test_rows_in_groups_are_computed_again(bundle_of):
    with load(bundle_of("llama"), lora=LoraOptions(rank=2), activation_memory=PLENTY) as model:
        for _ in range(2):
            model.loss(make_batch(), rows_at_once=1).backward()
        assert model.layers_kept == 0


def test_a_second_backward_pass_through_one_graph(bundle_of):
    with load(bundle_of("llama"), lora=LoraOptions(rank=2), activation_memory=PLENTY) as model:
        parameters = list(model.trainable().values())
        model.loss(make_batch()).backward()
        loss = model.loss(make_batch())
        first = torch.autograd.grad(loss, parameters, retain_graph=True)
        second = torch.autograd.grad(loss, parameters)
    assert all(map(torch.equal, first, second))


def test_more_tokens_are_reckoned_by_the_square_and_fewer_in_proportion():
    kept = ActivationBudget(layers=10, budget=10_000, counted=1000, tokens=100)
    of_one = kept.needed(100)
    assert kept.needed(50) == of_one / 2 and kept.needed(200) == 4 * of_one
    assert not any(kept.keeps(layer, 0) for layer in range(10))
