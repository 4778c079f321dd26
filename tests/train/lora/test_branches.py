"""What a branch is beside its layer: dtypes, dropout, norms, experts, parameter groups."""

import copy
from dataclasses import replace

import pytest
import torch
from dense_sites import plain_site

from loraformat.errors import UsageError
from loraformat.train import LoraOptions
from loraformat.train.loop.optimizer import parameter_groups
from loraformat.train.lora.branch import RowNorms, row_norms
from loraformat.train.lora.branches import attach, trainable


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def one(site, **options):
    return attach([site], LoraOptions(**{"rank": 4, "targets": ("*",), **options}))[site.name]


def grown(site, **options):
    """A branch whose B is not zero any more."""
    branch = one(site, **options)
    with torch.no_grad():
        branch.b.copy_(numbers(*branch.b.shape, seed=9) * 0.1)
    return branch


def test_a_branch_computes_in_float32_and_answers_in_the_layer_s_dtype():
    weight, x = numbers(12, 10), numbers(2, 3, 10, seed=1)
    branch = grown(plain_site("up_proj", weight))
    y = branch(x.bfloat16(), (x @ weight.T).bfloat16())
    assert y.dtype == torch.bfloat16 and y.shape == (2, 3, 12)
    wanted = (x @ weight.T).bfloat16().float() + x.bfloat16().float() @ (branch.b @ branch.a).T
    assert torch.equal(y, wanted.bfloat16())


def test_dropout_is_of_the_inputs_of_a_and_of_training_alone():
    weight, x = numbers(12, 40), torch.ones(2000, 40)
    branch = grown(plain_site("up_proj", weight), dropout=0.5)
    base, plain = x @ weight.T, x @ weight.T + x @ (branch.b @ branch.a).T
    assert torch.allclose(branch.eval()(x, base), plain, atol=1e-5)
    torch.manual_seed(0)
    y = branch.train()(x, base)
    assert not torch.allclose(y, plain, atol=1e-3)
    assert torch.allclose(y.mean(0), plain[0], atol=0.05)


def test_dropout_does_not_touch_what_pissa_takes_off():
    weight, x = numbers(12, 10), numbers(2000, 10, seed=1)
    branch = one(plain_site("up_proj", weight), init="pissa", dropout=0.5).train()
    with torch.no_grad():
        branch.b.zero_()
    residual = weight - branch.fixed_b @ branch.fixed_a
    assert torch.allclose(branch(x, x @ weight.T), x @ residual.T, atol=1e-4)


@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_norms_come_from_tiles(kind):
    weight, a, b = numbers(23, 10), numbers(3, 10, seed=1), numbers(23, 3, seed=2)
    merged = weight + 1.5 * b @ a
    site = plain_site("up_proj", weight)
    if kind == "embedding":
        site = plain_site("embed_tokens", weight.T.contiguous(), kind=kind)
    assert torch.allclose(row_norms(site, a, b, 1.5), merged.norm(dim=1), rtol=1e-6)


def test_norms_are_computed_again_only_for_other_factors():
    looks = []
    weight = numbers(6, 10)
    plain = plain_site("up_proj", weight)

    def tiles(expert):
        looks.append(expert)
        yield from plain.tiles(expert)

    norms = RowNorms(replace(plain, tiles=tiles))
    a, b = numbers(2, 10, seed=1), numbers(6, 2, seed=2)
    first = norms(a, b, 1.0)
    assert norms(a.clone(), b, 1.0) is first and len(looks) == 1
    a.data[0, 0] += 1  # as an optimizer that torch does not see
    assert not torch.equal(norms(a, b, 1.0), first) and len(looks) == 2


def test_experts_keep_right_gradients_over_steps_and_copies():
    stack, x = numbers(3, 12, 10), numbers(5, 10, seed=1)
    branch = grown(plain_site("mlp.experts.up_proj", stack))
    for _ in range(2):
        branch.zero_grad()
        total = sum(branch(x, x @ stack[e].T, e).square().sum() for e in (2, 0))
        total.backward()
        a, b = (factor.detach().clone().requires_grad_() for factor in (branch.a, branch.b))
        wanted = sum((x @ stack[e].T + x @ (b[e] @ a[e]).T).square().sum() for e in (2, 0))
        wanted.backward()
        assert torch.allclose(branch.a.grad, a.grad, atol=1e-4)
        assert torch.allclose(branch.b.grad, b.grad, atol=1e-4)
        with torch.no_grad():
            branch.a.sub_(0.01 * branch.a.grad)
        with torch.no_grad():
            branch(x, x @ stack[0].T, 0)  # an evaluation in between
    twin = copy.deepcopy(branch)
    with torch.no_grad():
        twin.a.zero_()
    assert torch.equal(twin(x, x @ stack[1].T, 1), x @ stack[1].T)
    assert not torch.equal(branch(x, x @ stack[1].T, 1), x @ stack[1].T)


@pytest.mark.parametrize(
    "site",
    [
        plain_site("mlp.experts.up_proj", numbers(3, 12, 10)),
        plain_site("mlp.up_proj", numbers(12, 10), in_peft="parameter"),
    ],
    ids=["experts", "called like experts"],
)
def test_what_peft_adapts_as_a_parameter_has_no_dora(site):
    with pytest.raises(UsageError, match=r"as a parameter .* no DoRA"):
        one(site, dora=True)


def test_progress_counts_branches():
    seen = []
    sites = [plain_site(f"layers.{n}.q_proj", numbers(4, 4)) for n in range(3)]
    options = LoraOptions(targets=("q_proj",))
    attach(sites, options, progress=lambda *counts: seen.append(counts))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_loraplus_gives_b_its_own_rate_and_magnitudes_no_decay():
    sites = [
        plain_site("model.embed_tokens", numbers(6, 4), kind="embedding"),
        plain_site("layers.0.q_proj", numbers(4, 4)),
    ]
    options = LoraOptions(targets=("q_proj",), embeddings=True, dora=True)
    parameters = trainable(attach(sites, options))
    groups = parameter_groups(parameters, 1e-3, ratio=16.0, weight_decay=0.1)
    table = {
        name: (group["lr"], group["weight_decay"]) for group in groups for name in group["names"]
    }
    assert table == {
        "model.embed_tokens.lora_embedding_A": (1e-3, 0.1),
        "model.embed_tokens.lora_embedding_B": (1e-3, 0.1),
        "model.embed_tokens.lora_magnitude_vector": (1e-3, 0.0),
        "layers.0.q_proj.lora_A.weight": (1e-3, 0.1),
        "layers.0.q_proj.lora_B.weight": (1.6e-2, 0.1),
        "layers.0.q_proj.lora_magnitude_vector": (1e-3, 0.0),
    }
    assert list(table) != list(parameters)  # groups are by rate, names still each their own
    optimizer = torch.optim.AdamW(groups)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(parameters)
    with pytest.raises(UsageError, match="at least 1"):
        parameter_groups(parameters, 1e-3, ratio=0.5)
