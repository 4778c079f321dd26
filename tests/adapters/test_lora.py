"""The mathematics, against dense float64 decompositions."""

import itertools
import math

import pytest
import torch

from loraformat.algebra import lora
from loraformat.algebra.interference import drop, elect, magnitude_threshold, prune
from loraformat.algebra.ranks import allocate, entropy_rank, noise_edge, stable_rank
from loraformat.algebra.subspace import block_krylov


@pytest.fixture
def random():
    return torch.Generator().manual_seed(1)


def factors(random, out, inner, r):
    return (
        torch.randn(out, r, generator=random, dtype=torch.float64),
        torch.randn(r, inner, generator=random, dtype=torch.float64),
    )


SHAPES = [(40, 30, 6), (30, 40, 6), (5, 30, 8), (30, 5, 8), (4, 4, 9), (7, 1, 3), (1, 7, 3)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scaling", [1.0, -0.25, 8.0])
def test_core_is_the_svd(random, shape, scaling):
    b, a = factors(random, *shape)
    d = scaling * b @ a
    k = min(shape)
    found = lora.core(b, a, scaling)
    assert torch.allclose(found.values, torch.linalg.svdvals(d)[:k])
    assert torch.allclose((found.left * found.gains) @ found.right, d)
    assert torch.allclose(found.left.T @ found.left, torch.eye(k, dtype=torch.float64))
    assert torch.allclose(found.right @ found.right.T, torch.eye(k, dtype=torch.float64))
    assert torch.allclose(found.mixing @ a, found.gains[:, None] * found.right)
    assert torch.allclose(lora.singular_values(b, a, scaling), found.values)
    assert found.squared_norm == pytest.approx(float(d.square().sum()))


def test_every_prefix_is_optimal(random):
    b, a = factors(random, 40, 30, 8)
    d = b @ a
    u, s, v = torch.linalg.svd(d, full_matrices=False)
    small_b, small_a = lora.truncate(lora.core(b, a), 8, torch.float64)
    for k in range(9):
        best = (u[:, :k] * s[:k]) @ v[:k]
        assert torch.allclose(small_b[:, :k] @ small_a[:k], best)
    assert torch.allclose(small_b.norm(dim=0), small_a.norm(dim=1))  # balanced


def test_core_survives_cancellation(random):
    """PiSSA's [A | A0], [B | -B0]: the delta is 1e-5 of its terms; float32 would lose it."""
    b0, a0 = factors(random, 60, 50, 4)
    b1, a1 = b0 + 1e-6 * torch.randn_like(b0), a0 + 1e-6 * torch.randn_like(a0)
    b, a = torch.cat([b1, -b0], 1), torch.cat([a1, a0], 0)
    found = lora.core(b, a)
    d = b @ a
    k_b, k_a = lora.truncate(found, 4, torch.float64)
    s = torch.linalg.svdvals(d)
    excess = (d - k_b @ k_a).norm() / s[4:].norm() - 1
    assert excess < 1e-6


def test_zero_and_rank_deficient(random):
    b, a = factors(random, 10, 12, 4)
    zero = lora.core(torch.zeros_like(b), a)
    assert zero.squared_norm == 0
    small = lora.truncate(zero, 2)
    assert not (small[0] @ small[1]).any()
    b[:, 3] = b[:, 0]
    assert lora.singular_values(b, a)[3] < 1e-12


def covariance(random, n):
    x = torch.randn(n, 3 * n, generator=random, dtype=torch.float64)
    x *= torch.logspace(0, -3, n, dtype=torch.float64)[:, None]
    return x @ x.T / x.shape[1]


def test_statistics_give_the_whitening_optimum(random):
    """SVD-LLM: SVD of D C^(1/2), truncated, times C^(-1/2); here from r x r numbers only."""
    b, a = factors(random, 24, 20, 8)
    c = covariance(random, 20)
    d = -0.5 * b @ a
    root = torch.linalg.cholesky(c)
    u, s, v = torch.linalg.svd(d @ root, full_matrices=False)
    found = lora.core(b, a, -0.5, a @ c @ a.T)
    assert torch.allclose(found.values, s[:8])
    for k in range(1, 9):
        whitened = (u[:, :k] * s[:k]) @ v[:k] @ torch.linalg.inv(root)
        small_b, small_a = lora.truncate(found, k, torch.float64)
        assert (small_b @ small_a - whitened).norm() / whitened.norm() < 1e-7
    full_b, full_a = lora.truncate(lora.core(b, a, -0.5), 3, torch.float64)
    aware_b, aware_a = lora.truncate(found, 3, torch.float64)

    def loss(m):
        return float(((d - m) @ c @ (d - m).T).trace())

    assert loss(aware_b @ aware_a) == pytest.approx(float(s[3:8].square().sum()))
    assert loss(aware_b @ aware_a) < 0.9 * loss(full_b @ full_a)


@pytest.mark.parametrize("aware", [False, True])
def test_the_moment_follows_the_factors(random, aware):
    b, a = factors(random, 24, 20, 8)
    c = covariance(random, 20)
    moment = a @ c @ a.T
    found = lora.core(b, a, 2.0, moment if aware else None)
    _, small = lora.truncate(found, 5, torch.float64)
    expected = small @ c @ small.T
    carried = lora.truncated_second_moment(found, moment, 5).double()
    assert (carried - expected).norm() / expected.norm() < 1e-6


def test_experts_are_decomposed_one_by_one(random):
    b = torch.randn(3, 10, 4, generator=random)
    a = torch.randn(3, 4, 12, generator=random)
    many = lora.truncate(lora.core(b, a, 2.0), 2, torch.float64)
    for e in range(3):
        one = lora.truncate(lora.core(b[e], a[e], 2.0), 2, torch.float64)
        assert torch.allclose(many[0][e] @ many[1][e], one[0] @ one[1])


def test_combined_factors_are_the_sum(random):
    terms = [(0.5, *factors(random, 9, 7, 2)), (-2.0, *factors(random, 9, 7, 3))]
    b, a = lora.combine_factors(terms)
    assert b.shape == (9, 5)
    assert torch.allclose(b @ a, sum(w * x @ y for w, x, y in terms))


@pytest.mark.parametrize(
    ("energy", "rank"), [(0, 0), (0.5, 1), (16 / 21, 1), (0.9, 2), (0.96, 3), (1, 3)]
)
def test_energy_rank(energy, rank):
    assert lora.energy_rank(torch.tensor([4.0, 2.0, 1.0]), energy) == rank
    assert lora.energy_rank(torch.zeros(3), energy) == 0
    assert lora.energy_rank(torch.zeros(0), energy) == 0


# Budgets


def best_by_force(values, costs, budget):
    choices = itertools.product(*(range(len(v) + 1) for v in values))
    return max(
        sum(float(v[:r].square().sum()) for v, r in zip(values, ranks, strict=True))
        for ranks in choices
        if sum(c * r for c, r in zip(costs, ranks, strict=True)) <= budget
    )


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("costs", [[7, 7, 7], [3, 5, 8]])
def test_budget_against_brute_force(seed, costs):
    random = torch.Generator().manual_seed(seed)
    values = [torch.rand(4, generator=random).sort(descending=True).values for _ in costs]
    for budget in range(0, 60, 4):
        ranks = allocate(values, costs, budget)
        spent = sum(c * r for c, r in zip(costs, ranks, strict=True))
        assert spent <= budget
        got = sum(float(v[:r].square().sum()) for v, r in zip(values, ranks, strict=True))
        best = best_by_force(values, costs, budget)
        if len(set(costs)) == 1:
            assert got == pytest.approx(best)
        # Never worse than the best of a budget that is smaller by one item.
        assert (
            got >= best_by_force(values, costs, budget - max(costs)) - 1e-9
            if (budget >= max(costs))
            else got <= best
        )


def test_budget_cap_and_zeros():
    values = [torch.tensor([3.0, 2.0, 1.0]), torch.tensor([1.0, 0.0])]
    assert allocate(values, [1, 1], 100) == [3, 1]
    assert allocate(values, [1, 1], 100, cap=2) == [2, 1]
    assert allocate([torch.zeros(2)], [1], 5) == [0]


def test_effective_ranks():
    assert stable_rank(torch.zeros(3)) == entropy_rank(torch.zeros(3)) == 0
    assert stable_rank(torch.ones(5)) == pytest.approx(5)
    assert entropy_rank(torch.ones(5)) == pytest.approx(5)
    assert entropy_rank(torch.tensor([3.0, 1.0])) == pytest.approx(
        math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    )


@pytest.mark.parametrize("shape", [(64, 64), (200, 50), (30, 400)])
def test_noise_stays_below_its_edge(shape):
    random = torch.Generator().manual_seed(3)
    largest = [
        float(torch.linalg.matrix_norm(torch.rand(shape, generator=random) - 0.5, 2))
        for _ in range(20)
    ]
    edge = noise_edge(math.sqrt(1 / 12), *shape)
    assert max(largest) < edge < 1.2 * max(largest)


# Block Krylov


def spectrum_matrix(random, m, n, values):
    u = torch.linalg.qr(torch.randn(m, len(values), generator=random)).Q
    v = torch.linalg.qr(torch.randn(n, len(values), generator=random)).Q
    return (u * values) @ v.T


def tiles_of(d, height=17):
    return lambda: ((i, d[i : i + height]) for i in range(0, len(d), height))


@pytest.mark.parametrize("shape", [(300, 200), (200, 300)])
@pytest.mark.parametrize(("power", "least"), [(0.6, 0.999), (1.0, 0.9999), (2.0, 0.999999)])
def test_krylov_on_decaying_spectra(random, shape, power, least):
    values = torch.arange(1, 201).float() ** -power
    d = spectrum_matrix(random, *shape, values)
    found = block_krylov(tiles_of(d), shape, 16)
    best = float(values[:16].double().square().sum() / values.double().square().sum())
    assert least < found.captured(16) / best <= 1 + 1e-5
    b, a = found.factors(16)
    true = float((d - b @ a).double().square().sum() / d.double().square().sum())
    assert 1 - found.captured(16) == pytest.approx(true, abs=1e-5)  # the certificate
    assert torch.allclose(b.norm(dim=0), a.norm(dim=1), rtol=1e-3)


@pytest.mark.parametrize("shape", [(1, 1), (5, 1), (1, 5), (6, 4), (4, 6), (33, 32)])
@pytest.mark.parametrize("block", [1, 4, 100])
def test_krylov_on_small_matrices(random, shape, block):
    d = torch.randn(shape, generator=random)
    found = block_krylov(tiles_of(d, 2), shape, block)
    k = min(block, *shape)
    exact = torch.linalg.svdvals(d)
    if block >= min(shape):
        assert torch.allclose(found.values[:k].float(), exact[:k], rtol=1e-4)
        b, a = found.factors(k)
        assert torch.allclose(b @ a, d, atol=1e-4)
    assert found.values[0] <= exact[0] * (1 + 1e-5)


def test_krylov_on_exact_low_rank_and_zero(random):
    d = spectrum_matrix(random, 80, 60, torch.tensor([3.0, 2.0, 1e-3]))
    found = block_krylov(tiles_of(d), (80, 60), 8)
    assert found.captured(3) == pytest.approx(1)
    assert found.values[2] == pytest.approx(1e-3, rel=1e-2)
    zero = block_krylov(tiles_of(torch.zeros(8, 6)), (8, 6), 2)
    assert (zero.captured(2), zero.squared_norm) == (1.0, 0.0)
    assert not zero.factors(2)[0].any()


# Interference


@pytest.mark.parametrize("keep", [1, 2, 50, 99, 100])
def test_threshold_is_the_kth_largest(random, keep):
    d = torch.randn(10, 10, generator=random)
    d[0, :3] = d[1, 0]
    expected = d.abs().flatten().sort(descending=True).values[keep - 1]
    assert magnitude_threshold(tiles_of_only(d), keep) == float(expected)
    assert int((prune(d, float(expected)) != 0).sum()) >= keep


def tiles_of_only(d):
    return lambda: (d[i : i + 3] for i in range(0, len(d), 3))


def test_drop_keeps_the_mean():
    random = torch.Generator().manual_seed(0)
    dropped = drop(torch.ones(100_000), 0.2, random)
    assert set(dropped.unique().tolist()) == {0.0, 5.0}
    assert float(dropped.mean()) == pytest.approx(1, abs=0.03)


def test_elect():
    one, other = torch.tensor([3.0, -1.0, 0.0, 2.0]), torch.tensor([-1.0, -2.0, 5.0, 2.0])
    assert elect([one, other]).tolist() == [3.0, -1.5, 5.0, 2.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("experts", [(), (3,)])
def test_rounding_error_is_that_of_the_rounded_product(dtype, experts):
    random = torch.Generator().manual_seed(1)
    b = torch.randn(*experts, 40, 6, generator=random, dtype=torch.float64)
    a = torch.randn(*experts, 6, 30, generator=random, dtype=torch.float64)
    near = b.to(dtype).double() @ a.to(dtype).double()
    wanted = float((b @ a - near).norm() / (b @ a).norm())
    assert lora.rounding_error(b, a, dtype) == pytest.approx(wanted, rel=1e-6)
    assert lora.rounding_error(0 * b, a, dtype) == 0
