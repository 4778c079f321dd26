"""The second moment of A x: counted once for each position that a trained token depends on."""

import pytest
import torch
from dense_sites import plain_site
from torch.utils.checkpoint import checkpoint

from loraformat.errors import InputError
from loraformat.train import LoraOptions
from loraformat.train.lora.branch import branch_of
from loraformat.train.lora.branches import attach, extra_state, load_extra_state
from loraformat.train.lora.initialise import initial
from loraformat.train.lora.second_moments import HALF_LIFE, Moments, observe, share_of_noise


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def made(weight, **options):
    options = LoraOptions(**{"rank": 4, **options})
    site = plain_site("up_proj", weight)
    branch = branch_of(
        site, initial(site, options.rank, options), 1.0,
        dropout=options.dropout, dora=options.dora, collecting=True,
    )  # fmt: skip
    return branch.train()


def step(branch, x, weight, trained):
    """A backward pass in which only the trained rows have a loss."""
    branch(x, x @ weight.T)[trained].square().sum().backward()


def direct(branch, x):
    z = (x @ branch.effective()[0].T).double()
    return (z.mT @ z / len(z)).float()


@pytest.mark.parametrize("init", ["kaiming", "pissa"])
@pytest.mark.parametrize("dora", [False, True])
def test_it_is_that_of_the_rows_with_a_gradient(init, dora):
    weight, x = numbers(12, 10), numbers(9, 10, seed=1)
    branch = made(weight, init=init, dora=dora)
    trained = torch.tensor([1, 2, 5])
    step(branch, x, weight, trained)
    assert branch.moments.count == 3
    assert torch.allclose(branch.moments.second_moment(), direct(branch, x[trained]), rtol=1e-5)


def counted(gradient, dtype=torch.float32):
    """How many of the rows count that get these gradients."""
    gradient = torch.tensor(gradient, dtype=dtype)
    moments = Moments(2)
    leaf = torch.zeros(gradient.shape, dtype=dtype, requires_grad=True)
    observe(leaf * 1, torch.ones(*gradient.shape[:-1], 2), moments).backward(gradient)
    return moments.count.item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_is_no_gradient_whatever_the_scale(dtype):
    share = share_of_noise(dtype)
    for largest in (1.0, 1e-3, 100.0):
        rows = [[0, -largest], [2 * share * largest, 0], [share * largest / 2, 0], [0, 0]]
        assert counted(rows, dtype) == 2
        assert counted([rows], dtype) == 2


def test_no_gradient_at_all_counts_nothing():
    assert counted([[0.0, 0.0], [0.0, 0.0]]) == 0
    assert counted([[1e-40, 0.0], [0.0, 0.0]]) == 1  # so small that its share is zero
    assert counted([[torch.inf, 0.0], [1.0, 0.0]]) == counted([[torch.nan, 0.0], [1.0, 0.0]]) == 0


def test_an_expert_without_tokens_counts_nothing():
    moments = Moments(2, experts=3)
    output = torch.zeros(0, 4, requires_grad=True) * 1
    observe(output, torch.zeros(0, 2), moments, 1).backward(torch.zeros(0, 4))
    assert moments.count.tolist() == [0, 0, 0]


def test_dropout_does_not_enlarge_it():
    weight, x = numbers(12, 10), numbers(6, 10, seed=1)
    branch = made(weight, dropout=0.5)
    step(branch, x, weight, slice(None))
    assert torch.allclose(branch.moments.second_moment(), direct(branch, x), rtol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_layer_counts_once(reentrant):
    weight, x = numbers(12, 10), numbers(6, 10, seed=1).requires_grad_()
    branch = made(weight)
    y = checkpoint(lambda v: branch(v, v @ weight.T), x, use_reentrant=reentrant)
    y.square().sum().backward()
    assert branch.moments.count == 6
    assert torch.allclose(branch.moments.second_moment(), direct(branch, x.detach()), rtol=1e-5)


def test_nothing_is_collected_in_evaluation_or_when_it_is_off():
    weight, x = numbers(12, 10), numbers(6, 10, seed=1)
    branch = made(weight).eval()
    step(branch, x, weight, slice(None))
    branch.train().collecting = False
    step(branch, x, weight, slice(None))
    assert branch.moments.second_moment() is None


def test_gradients_are_those_without_collecting():
    weight, x = numbers(12, 10), numbers(6, 10, seed=1)
    gradients = []
    for collecting in (True, False):
        branch = made(weight, init="orthogonal")
        branch.collecting = collecting
        step(branch, x, weight, slice(None))
        gradients.append((branch.a.grad, branch.b.grad))
    assert all(map(torch.equal, *gradients))


def test_each_expert_has_its_own_tokens():
    stack, x = numbers(3, 12, 10), numbers(6, 10, seed=1)
    branch = made(stack)
    for expert, rows in ((0, [0, 1]), (2, [2, 3, 4])):
        y = branch(x[rows], x[rows] @ stack[expert].T, expert)
        y.square().sum().backward()
    found = branch.moments.second_moment()
    assert branch.moments.count.tolist() == [2, 0, 3]
    z = x[2:5] @ branch.a[2].T
    assert torch.allclose(found[2], z.T @ z / 3, rtol=1e-5)
    assert not found[1].any()


def test_what_was_seen_long_ago_fades():
    moments = Moments(1)
    moments.add(torch.full((HALF_LIFE, 1), 1.0))
    moments.add(torch.full((HALF_LIFE, 1), 3.0))
    assert moments.second_moment().item() == pytest.approx((0.5 * 1 + 9) / 1.5)
    assert moments.count == 1.5 * HALF_LIFE


def test_sums_of_two_processes_add_up():
    halves, whole = [Moments(2), Moments(2)], Moments(2)
    z = numbers(8, 2)
    whole.add(z)
    for half, rows in zip(halves, (z[:5], z[5:]), strict=True):
        half.add(rows)
    both = Moments(2)
    states = [half.state() for half in halves]
    both.load(*(states[0][key] + states[1][key] for key in ("total", "count")))
    assert torch.allclose(both.second_moment(), whole.second_moment(), rtol=1e-3)


def test_state_goes_over_a_restart_bit_by_bit():
    weight, x = numbers(12, 10), numbers(6, 10, seed=1)
    sites = [plain_site(name, weight) for name in ("q_proj", "k_proj")]
    branches = attach(sites, LoraOptions(targets=("*_proj",), rank=4))
    for branch in branches.values():
        step(branch, x, weight, slice(None))
    again = attach(sites, LoraOptions(targets=("*_proj",), rank=4))
    load_extra_state(again, extra_state(branches))
    assert torch.equal(
        again["k_proj"].moments.second_moment(), branches["k_proj"].moments.second_moment()
    )
    other = attach(sites[:1], LoraOptions(targets=("*_proj",), rank=4))
    with pytest.raises(InputError, match="not those of this adapter: k_proj"):
        load_extra_state(other, extra_state(branches))
    longer = attach(sites, LoraOptions(targets=("*_proj",), rank=8))
    with pytest.raises(InputError, match="not those of this adapter"):
        load_extra_state(longer, extra_state(branches))


def test_without_statistics_there_is_no_state():
    sites = [plain_site("q_proj", numbers(12, 10))]
    assert extra_state(attach(sites, LoraOptions(targets=("q_proj",), statistics=False))) == {}
