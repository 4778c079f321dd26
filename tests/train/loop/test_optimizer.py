"""Schedules, gradients, optimizers and their states, held against torch's and bitsandbytes'."""

import math
import os

import pytest
import torch

from loraformat.errors import InputError, ResourceError, UsageError
from loraformat.train.loop.accumulation import clipped_mean, flat, non_finite, norm, spread
from loraformat.train.loop.memory import resident
from loraformat.train.loop.optimizer import DiskStates, Optimizer
from loraformat.train.loop.optimizer_options import (
    OPTIMIZERS,
    SMALL,
    OptimizerOptions,
    Schedule,
    state_bytes,
)

SHAPES = {"a": (16, 96), "b": (130, 64), "magnitude": (130,)}


def parameters(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.nn.Parameter(torch.randn(shape, generator=generator))
        for name, shape in SHAPES.items()
    }


def give_gradients(named, step):
    generator = torch.Generator().manual_seed(1000 + step)
    for parameter in named.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def trained(options, steps=6, directory=None, ratios=None):
    named = parameters()
    optimizer = Optimizer(named, options, directory=directory, ratios=ratios)
    for step in range(steps):
        give_gradients(named, step)
        optimizer.step(1e-2)
    return named, optimizer


# Schedules


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_schedules_are_those_of_transformers(kind):
    """Shifted by one step in the warmup: the first step of ours is not wasted at a rate of 0."""
    from transformers import get_scheduler

    weight = torch.nn.Parameter(torch.zeros(1))
    theirs = torch.optim.SGD([weight], lr=0.3)
    name = "constant_with_warmup" if kind == "constant" else kind
    scheduler = get_scheduler(name, theirs, num_warmup_steps=5, num_training_steps=40)
    rates = []
    for _ in range(40):
        rates.append(scheduler.get_last_lr()[0])
        theirs.step()
        scheduler.step()
    ours = Schedule(kind, 0.3, total=40, warmup=5)
    assert [ours(step) for step in range(4)] == pytest.approx(rates[1:5])
    assert [ours(step) for step in range(5, 40)] == pytest.approx(rates[5:])


def test_warmup_as_a_share_of_the_steps():
    assert Schedule("cosine", 1.0, total=100, warmup=0.03).warmup_steps == 3
    assert Schedule("cosine", 1.0, total=10, warmup=0.03).warmup_steps == 1
    assert Schedule("cosine", 1.0, total=10, warmup=50).warmup_steps == 10
    assert Schedule("cosine", 1.0, total=10)(0) == 1.0


@pytest.mark.parametrize(
    "wrong", [{"kind": "step"}, {"peak": 0.0}, {"peak": math.nan}, {"warmup": -1.0}]
)
def test_schedules_refuse(wrong):
    with pytest.raises(UsageError):
        Schedule(**{"kind": "cosine", "peak": 1.0, "total": 4, **wrong})


# Gradients


def test_clipping_is_that_of_torch():
    ours, theirs = parameters(), parameters()
    give_gradients(ours, 0)
    give_gradients(theirs, 0)
    for parameter in theirs.values():
        parameter.grad /= 7
    length = float(torch.nn.utils.clip_grad_norm_(theirs.values(), 0.5))
    assert clipped_mean(ours.values(), 7, 0.5) == pytest.approx(length, rel=1e-6)
    assert norm(ours.values()) == pytest.approx(0.5, rel=1e-5)
    for name, parameter in theirs.items():
        torch.testing.assert_close(ours[name].grad, parameter.grad, rtol=1e-5, atol=1e-8)


def test_a_short_gradient_is_only_divided():
    named = parameters()
    give_gradients(named, 0)
    before = {name: p.grad.clone() for name, p in named.items()}
    clipped_mean(named.values(), 4, 1e9)
    assert all(torch.equal(p.grad, before[name] / 4) for name, p in named.items())


def test_non_finite_gradients_are_named():
    named = parameters()
    give_gradients(named, 0)
    assert non_finite(named) is None
    named["b"].grad[3, 3] = math.inf
    assert non_finite(named) == "b"
    assert not math.isfinite(clipped_mean(named.values(), 4, 1.0))


def test_flat_and_back():
    named = parameters()
    give_gradients(named, 0)
    before = {name: p.grad.clone() for name, p in named.items()}
    vector = flat(named.values(), [3.0, 5.0])
    named["a"].grad = None
    spread(vector * 2, named.values())
    assert vector[-2:].tolist() == [3.0, 5.0]
    assert all(torch.equal(p.grad, before[name] * 2) for name, p in named.items())


# Optimizers


def test_adamw_is_that_of_torch():
    named, _ = trained(OptimizerOptions("adamw", weight_decay=0.1))
    theirs = parameters()
    matrices = [theirs["a"], theirs["b"]]
    reference = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": 0.1},
            {"params": [theirs["magnitude"]], "weight_decay": 0.0},
        ],
        lr=1e-2,
    )
    for step in range(6):
        give_gradients(theirs, step)
        reference.step()
    for name, parameter in theirs.items():
        torch.testing.assert_close(named[name], parameter, rtol=1e-6, atol=1e-7)


def test_states_on_disk_give_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setattr("loraformat.train.loop.optimizer._PART_BYTES", 16 * 96 * 4)
    memory, first = trained(OptimizerOptions("adamw"))
    disk, second = trained(OptimizerOptions("adamw", states="disk"), directory=tmp_path)
    assert all(torch.equal(memory[name], disk[name]) for name in memory)
    kept = second.tensors()
    assert all(torch.equal(value, kept[name]) for name, value in first.tensors().items())
    assert list(tmp_path.iterdir()) == []  # a file without a name


def test_disk_states_need_room(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ResourceError, match="disk is full"):
        DiskStates(tmp_path, [(4, 4)])


def test_disk_states_are_not_resident_after_release(tmp_path):
    states = DiskStates(tmp_path, [(1 << 20,)])
    states.tensors[0].fill_(1.0)
    before = resident()
    states.release()
    assert before - resident() >= 3 << 20
    assert float(states.tensors[0].sum()) == 1 << 20


def test_eight_bit_is_that_of_bitsandbytes():
    from bitsandbytes.optim import AdamW8bit

    named, optimizer = trained(OptimizerOptions("adamw-8bit"))
    theirs = parameters()
    reference = AdamW8bit(list(theirs.values()), lr=1e-2, weight_decay=0.0)
    for step in range(6):
        give_gradients(theirs, step)
        reference.step()
    assert all(torch.equal(named[name], theirs[name]) for name in named)
    assert optimizer.tensors()["state1:b"].dtype == torch.uint8


def test_ratios_multiply_the_learning_rate():
    plain, _ = trained(OptimizerOptions("sgd"), steps=1)
    ratio, _ = trained(OptimizerOptions("sgd"), steps=1, ratios={"b": 16.0})
    start = parameters()
    assert torch.equal(plain["a"], ratio["a"])
    torch.testing.assert_close(ratio["b"] - start["b"], 16 * (plain["b"] - start["b"]))


@pytest.mark.parametrize("kind", sorted(set(OPTIMIZERS) - {"paged-adamw-8bit"}))
def test_states_restored_go_on_bit_for_bit(kind):
    whole, _ = trained(OptimizerOptions(kind), steps=6)
    half, first = trained(OptimizerOptions(kind), steps=3)
    kept = {name: value.clone() for name, value in first.tensors().items()}
    numbers = first.numbers()
    second = Optimizer(half, OptimizerOptions(kind))
    second.restore(kept, numbers)
    for step in range(3, 6):
        give_gradients(half, step)
        second.step(1e-2)
    assert all(torch.equal(whole[name], half[name]) for name in whole)


def test_strange_states_are_refused():
    _, optimizer = trained(OptimizerOptions("adamw"), steps=1)
    kept = optimizer.tensors()
    name = "exp_avg:a"
    with pytest.raises(InputError, match="missing"):
        optimizer.restore({k: v for k, v in kept.items() if k != name}, {})
    with pytest.raises(InputError, match="shape"):
        optimizer.restore({**kept, name: torch.zeros(3)}, {})


@pytest.mark.parametrize("kind", ["adamw", "sgd", "adamw-8bit"])
def test_state_bytes_are_what_states_take(kind):
    """Of 8-bit ones a bound, near enough to tell them from the 8 bytes that small tensors have."""
    named, optimizer = trained(OptimizerOptions(kind), steps=1)
    sizes = [p.numel() for p in named.values()]
    small = sum(size for size in sizes if size < SMALL)
    assert 0 < small < sum(sizes)
    taken = sum(v.numel() * v.element_size() for v in optimizer.tensors().values() if v.ndim)
    reckoned = state_bytes(kind, sum(sizes), small)
    assert taken <= reckoned <= 1.01 * taken


def test_paged_states_are_for_gpus():
    with pytest.raises(UsageError, match="optimizer-states disk"):
        Optimizer(parameters(), OptimizerOptions("paged-adamw-8bit"))


@pytest.mark.parametrize(
    "wrong", [{"kind": "adam"}, {"states": "tape"}, {"kind": "sgd", "states": "disk"}]
)
def test_options_refuse(wrong):
    with pytest.raises(UsageError):
        OptimizerOptions(**wrong)
