"""Loss and gradients of an adapter here, and what PEFT makes of that adapter on the dense model."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from loraformat.errors import LoraFormatError
from loraformat.families.table import family_of
from loraformat.families.tensor_names import layer_of
from loraformat.ops.convert.convert import convert
from loraformat.train import LoraOptions, TrainableModel, load
from tests.train import causal_models
from tests.train.engine.reference import dense_loss, make_batch, relative

#: Of a gradient's norm; what is below `_NOTHING` of the largest gradient is rounding noise.
_TOLERANCE = 1e-3
_NOTHING = 1e-6


def bases(folder: Path, model: Any) -> Path:
    """Write a bundle of a model, and ``folder/dense`` with the values of its codes."""
    model.save_pretrained(folder / "original")
    convert(folder / "original", folder / "bundle")
    convert(folder / "bundle", folder / "dense", to_format="safetensors", dtype="f32")
    return folder / "bundle"


def dense_model(folder: Path) -> Any:
    """Return the dense float32 model in a directory, to be computed with."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    return model.eval()


def made_in_peft(dense: Any, folder: Path, **options: Any) -> Any:
    """Write an adapter that PEFT makes of a dense model; returns the model with it."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, init_lora_weights=False, task_type="CAUSAL_LM", **options)
    model = peft.get_peft_model(dense, config).eval()
    model.save_pretrained(folder)
    return model


def assert_trained_as_in_peft(model_type: str, folder: Path) -> None:
    """Assert that a class's loss and LoRA gradients here are those of PEFT.

    That layers share weights is what the table of families says of it, too.
    """
    original = causal_models.make(model_type)
    shared = {name for name in original.all_tied_weights_keys if layer_of(name)}
    family = family_of(original.config.to_dict())
    assert all(map(family.is_shared, shared))
    assert bool(shared) == (family.shared_block is not None)
    bundle = bases(folder, original)
    with with_random_factors(bundle) as model:
        compare_with_peft(model, folder)


def assert_refused(model_type: str, folder: Path) -> None:
    """Assert that a class is refused for the reason in the table, and nothing is written."""
    bundle = bases(folder, causal_models.make(model_type))
    before = sorted(folder.rglob("*"))
    with pytest.raises(LoraFormatError) as refused, with_random_factors(bundle) as model:
        model.loss(make_batch(length=12, vocabulary=causal_models.VOCABULARY))
    assert refused.value.problem.startswith(causal_models.REFUSED[model_type][0])
    assert sorted(folder.rglob("*")) == before


def with_random_factors(bundle: Path) -> TrainableModel:
    """Open a bundle with an adapter of all linears that is not the identity."""
    model = load(bundle, lora=LoraOptions(rank=2, alpha=2), activation_memory=0)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for branch in model.branches.values():
            for factor in (branch.a, branch.b):
                factor.copy_(torch.randn(factor.shape, generator=random) * 0.1)
    return model


def compare_with_peft(model: TrainableModel, folder: Path) -> None:
    """Assert that loss and gradients are those of PEFT on ``folder/dense``.

    Ours are written as an adapter, so that PEFT's reader says which of its parameters each is of.
    """
    batch = make_batch(length=12, vocabulary=causal_models.VOCABULARY)
    model.loss(batch).backward()  # in training mode, and with the trial
    model.eval().zero_grad()
    loss = model.loss(batch)
    loss.backward()
    model.save_adapter(folder / "adapter")
    with torch.no_grad():
        for parameter in model.trainable().values():
            grad = parameter.grad
            parameter.copy_(torch.zeros_like(parameter) if grad is None else grad)
    model.save_adapter(folder / "gradients")
    dense = dense_model(folder / "dense")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        theirs = peft.PeftModel.from_pretrained(dense, folder / "adapter", is_trainable=True)
        theirs.load_adapter(folder / "gradients", "gradients")
    expected = dense_loss(theirs.eval(), batch)
    expected.backward()
    assert relative(loss.detach(), expected.detach()) < 1e-6
    parameters = dict(theirs.named_parameters())
    pairs = {}
    for name, parameter in parameters.items():
        if ".default" in name:
            there = parameter != 0  # not so: what fills up ranks that PEFT wants equal
            found = parameters[name.replace(".default", ".gradients")][there]
            grad = parameter.grad
            pairs[name] = found, torch.zeros_like(found) if grad is None else grad[there]
    least = _NOTHING * max(float(wanted.norm()) for _, wanted in pairs.values())
    for name, (found, wanted) in pairs.items():
        assert (found - wanted).norm() < _TOLERANCE * wanted.norm() + least, name
    assert pairs
