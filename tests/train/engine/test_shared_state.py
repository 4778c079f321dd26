"""State that layers share has its gradient whichever way a class passes it, or it is refused."""

import copy
import threading
from collections import UserDict

import pytest
import torch
from transformers.models.llama import modeling_llama

from loraformat.errors import UnsupportedError
from loraformat.train import load
from tests.train.engine.reference import (
    dense_loss,
    gradients,
    make_batch,
    merged_weights,
    relative,
)


class Kept:
    """An object of a class that nobody knows, with a list in it."""

    def __init__(self):
        self.of = {"states": []}


class Locked(Kept):
    """One that cannot be copied."""

    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()


def by_item(layer, shared, state=None):
    if state is None:
        return shared.get("state")
    shared["state"] = state


def by_list(layer, shared, state=None):
    states = shared.of["states"]
    if state is None:
        return sum(states) if states else None
    states.append(state)


def by_attribute_of_the_writer(layer, shared, state=None):
    if state is None:
        return getattr(shared, "state", None)
    layer.state = state


#: What is passed to each layer, and how a layer reads what the last one left, and leaves its own.
CARRIED = {
    "dict": (dict, by_item),
    "UserDict": (UserDict, by_item),
    "an object": (Kept, by_list),
    "an attribute of a module": (None, by_attribute_of_the_writer),
}
_global = {}
REFUSED = {
    "an object that cannot be copied": (Locked, by_list),
    "a global that is overwritten": (lambda: None, lambda layer, _, *new: by_item(
        layer, _global, *new)),
}  # fmt: skip


@pytest.fixture
def sharing(monkeypatch, opened, attach):
    """Opens a llama whose layers multiply by what earlier ones left."""

    def make(container, access):
        inner = modeling_llama.LlamaDecoderLayer.forward
        whole = modeling_llama.LlamaModel.forward

        def layer_forward(self, hidden_states, shared=None, **options):
            if container is None:  # the layer before
                shared = self.__dict__.get("before")
            earlier = access(self, shared)
            output = inner(self, hidden_states, **options)
            access(self, shared, output * 0.3)
            return output if earlier is None else output * (1 + 0.1 * earlier)

        def model_forward(self, *arguments, **options):
            _global.clear()
            if container is None:
                for before, layer in zip(self.layers, self.layers[1:], strict=False):
                    layer.__dict__["before"] = before
                return whole(self, *arguments, **options)
            return whole(self, *arguments, shared=container(), **options)

        monkeypatch.setattr(modeling_llama.LlamaDecoderLayer, "forward", layer_forward)
        monkeypatch.setattr(modeling_llama.LlamaModel, "forward", model_forward)
        model, dense = opened("llama")
        return attach(model), dense

    return make


@pytest.mark.parametrize("way", CARRIED)
def test_what_layers_share_has_its_gradient(sharing, way):
    model, dense = sharing(*CARRIED[way])
    batch = make_batch()
    for budget in (0, 1 << 30):
        model.activation_memory = budget
        for _ in range(2):
            model.zero_grad()
            loss = model.loss(batch)
            loss.backward()
        factors, weights = merged_weights(model, dense)
        expected = dense_loss(dense, batch, weights)
        expected.backward()
        assert relative(loss.detach(), expected.detach()) < 1e-6
        found = gradients(model)
        for name, (a, b) in factors.items():
            assert relative(found[f"{name}.branch.a"], a.grad) < 1e-5, name
            assert relative(found[f"{name}.branch.b"], b.grad) < 1e-5, name


@pytest.mark.parametrize("architecture", ["gemma3n_text", "gemma4_text"])
def test_models_that_share_keys_and_values(opened, attach, architecture):
    model, dense = opened(architecture)
    attach(model)
    batch = make_batch()
    model.activation_memory = 0
    model.loss(batch).backward()
    factors, weights = merged_weights(model, dense)
    dense_loss(dense, batch, weights).backward()
    found = gradients(model)
    for name, (a, b) in factors.items():
        assert relative(found[f"{name}.branch.a"], a.grad) < 1e-4, name
        assert relative(found[f"{name}.branch.b"], b.grad) < 1e-4, name
    assert len(found) == 2 * len(factors) > 40
    model.train()  # where Gemma 3n bounds some of its weights
    assert relative(model.loss(batch).detach(), dense_loss(dense.train(), batch, weights)) < 1e-5


@pytest.mark.parametrize("way", REFUSED)
def test_a_class_that_shares_state_in_a_way_that_is_not_known_is_refused(sharing, way):
    model, _ = sharing(*REFUSED[way])
    with pytest.raises(UnsupportedError, match="not those of plain autograd") as caught:
        model.loss(make_batch())
    assert "PEFT" in caught.value.hint
    with torch.no_grad():
        assert model.loss(make_batch()) > 0  # it can be evaluated


@pytest.mark.parametrize("way", CARRIED)
def test_layers_that_share_state_do_not_take_rows_in_groups(sharing, way):
    model, _ = sharing(*CARRIED[way])
    with pytest.raises(UnsupportedError, match="in groups of rows") as caught:
        model.loss(make_batch(), rows_at_once=1)
    assert "--layer-major" in caught.value.hint
    model.loss(make_batch()).backward()


def test_a_trial_leaves_no_trace(bundle_of):
    from loraformat.train import LoraOptions

    with load(bundle_of("gpt2"), lora=LoraOptions(rank=2)) as model:
        before = copy.deepcopy({**model.extra_state(), **model.trainable()})
        state, visits = torch.get_rng_state(), list(model.traffic.visits)
        model._trial.gradients(make_batch().input_ids)
        model._trial.gradients(make_batch().input_ids, rows_at_once=1)
        assert torch.equal(state, torch.get_rng_state()) and visits == model.traffic.visits
        assert all(map(torch.equal, before.values(), {
            **model.extra_state(), **model.trainable()}.values()))  # fmt: skip
        assert all(p.grad is None for p in model.parameters())
        assert model.training and all(m.training for m in model.modules())
