"""The mathematics, against dense float64 decompositions."""

import itertools
import math

import numpy
import pytest

from loraformat.algebra import lora
from loraformat.algebra.interference import drop, elect, magnitude_threshold, prune
from loraformat.algebra.ranks import allocate, entropy_rank, noise_edge, stable_rank
from loraformat.algebra.subspace import block_krylov
from loraformat.tensors.arrays import numpy_dtype

norm = numpy.linalg.norm


def svdvals(d):
    return numpy.linalg.svd(d, compute_uv=False)


@pytest.fixture
def random():
    return numpy.random.default_rng(1)


def factors(random, out, inner, r):
    return random.standard_normal((out, r)), random.standard_normal((r, inner))


SHAPES = [(40, 30, 6), (30, 40, 6), (5, 30, 8), (30, 5, 8), (4, 4, 9), (7, 1, 3), (1, 7, 3)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scaling", [1.0, -0.25, 8.0])
def test_core_is_the_svd(random, shape, scaling):
    b, a = factors(random, *shape)
    d = scaling * b @ a
    k = min(shape)
    found = lora.core(b, a, scaling)
    assert numpy.allclose(found.values, svdvals(d)[:k])
    left, right = found.columns @ found.left_mixing, found.right_mixing @ found.rows
    assert numpy.allclose((left * found.gains) @ right, d)
    assert numpy.allclose(left.T @ left, numpy.eye(k))
    assert numpy.allclose(right @ right.T, numpy.eye(k))
    assert numpy.allclose(found.mixing @ a, found.gains[:, None] * right)
    assert numpy.allclose(lora.singular_values(b, a, scaling), found.values)
    assert (found.gains**2).sum() == pytest.approx((d**2).sum())


def test_every_prefix_is_optimal(random):
    b, a = factors(random, 40, 30, 8)
    d = b @ a
    u, s, v = numpy.linalg.svd(d, full_matrices=False)
    small_b, small_a = lora.truncate(lora.core(b, a), 8, numpy.float64)
    for k in range(9):
        best = (u[:, :k] * s[:k]) @ v[:k]
        assert numpy.allclose(small_b[:, :k] @ small_a[:k], best)
    assert numpy.allclose(norm(small_b, axis=0), norm(small_a, axis=1))  # balanced


def test_core_survives_cancellation(random):
    """PiSSA's [A | A0], [B | -B0]: the delta is 1e-5 of its terms; float32 would lose it."""
    b0, a0 = factors(random, 60, 50, 4)
    b1, a1 = (x + 1e-6 * random.standard_normal(x.shape) for x in (b0, a0))
    b, a = numpy.concatenate([b1, -b0], 1), numpy.concatenate([a1, a0], 0)
    found = lora.core(b, a)
    d = b @ a
    k_b, k_a = lora.truncate(found, 4, numpy.float64)
    s = svdvals(d)
    excess = norm(d - k_b @ k_a) / norm(s[4:]) - 1
    assert excess < 1e-6


def test_zero_and_rank_deficient(random):
    b, a = factors(random, 10, 12, 4)
    zero = lora.core(numpy.zeros_like(b), a)
    assert not zero.gains.any()
    small = lora.truncate(zero, 2)
    assert not (small[0] @ small[1]).any()
    b[:, 3] = b[:, 0]
    assert lora.singular_values(b, a)[3] < 1e-12


def covariance(random, n):
    x = random.standard_normal((n, 3 * n)) * numpy.logspace(0, -3, n)[:, None]
    return x @ x.T / x.shape[1]


def test_statistics_give_the_whitening_optimum(random):
    """SVD-LLM: SVD of D C^(1/2), truncated, times C^(-1/2); here from r x r numbers only."""
    b, a = factors(random, 24, 20, 8)
    c = covariance(random, 20)
    d = -0.5 * b @ a
    root = numpy.linalg.cholesky(c)
    u, s, v = numpy.linalg.svd(d @ root, full_matrices=False)
    found = lora.core(b, a, -0.5, a @ c @ a.T)
    assert numpy.allclose(found.values, s[:8])
    for k in range(1, 9):
        whitened = (u[:, :k] * s[:k]) @ v[:k] @ numpy.linalg.inv(root)
        small_b, small_a = lora.truncate(found, k, numpy.float64)
        assert norm(small_b @ small_a - whitened) / norm(whitened) < 1e-7
    full_b, full_a = lora.truncate(lora.core(b, a, -0.5), 3, numpy.float64)
    aware_b, aware_a = lora.truncate(found, 3, numpy.float64)

    def loss(m):
        return float(((d - m) @ c @ (d - m).T).trace())

    assert loss(aware_b @ aware_a) == pytest.approx(float((s[3:8] ** 2).sum()))
    assert loss(aware_b @ aware_a) < 0.9 * loss(full_b @ full_a)


@pytest.mark.parametrize("aware", [False, True])
def test_the_moment_follows_the_factors(random, aware):
    b, a = factors(random, 24, 20, 8)
    c = covariance(random, 20)
    moment = a @ c @ a.T
    found = lora.core(b, a, 2.0, moment if aware else None)
    _, small = lora.truncate(found, 5, numpy.float64)
    expected = small @ c @ small.T
    carried = lora.truncated_second_moment(found, moment, 5)
    assert norm(carried - expected) / norm(expected) < 1e-6


def test_experts_are_decomposed_one_by_one(random):
    b, a = random.standard_normal((3, 10, 4)), random.standard_normal((3, 4, 12))
    many = lora.truncate(lora.core(b, a, 2.0), 2, numpy.float64)
    for e in range(3):
        one = lora.truncate(lora.core(b[e], a[e], 2.0), 2, numpy.float64)
        assert numpy.allclose(many[0][e] @ many[1][e], one[0] @ one[1])


def test_combined_factors_are_the_sum(random):
    terms = [(0.5, *factors(random, 9, 7, 2)), (-2.0, *factors(random, 9, 7, 3))]
    b, a = lora.combine_factors(terms)
    assert b.shape == (9, 5)
    assert numpy.allclose(b @ a, sum(w * x @ y for w, x, y in terms))


@pytest.mark.parametrize(
    ("energy", "rank"), [(0, 0), (0.5, 1), (16 / 21, 1), (0.9, 2), (0.96, 3), (1, 3)]
)
def test_energy_rank(energy, rank):
    assert lora.energy_rank(numpy.array([4.0, 2.0, 1.0]), energy) == rank
    assert lora.energy_rank(numpy.zeros(3), energy) == 0
    assert lora.energy_rank(numpy.zeros(0), energy) == 0


# Budgets


def best_by_force(values, costs, budget):
    choices = itertools.product(*(range(len(v) + 1) for v in values))
    return max(
        sum(float((v[:r] ** 2).sum()) for v, r in zip(values, ranks, strict=True))
        for ranks in choices
        if sum(c * r for c, r in zip(costs, ranks, strict=True)) <= budget
    )


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("costs", [[7, 7, 7], [3, 5, 8]])
def test_budget_against_brute_force(seed, costs):
    random = numpy.random.default_rng(seed)
    values = [numpy.sort(random.random(4))[::-1] for _ in costs]
    for budget in range(0, 60, 4):
        ranks = allocate(values, costs, budget)
        spent = sum(c * r for c, r in zip(costs, ranks, strict=True))
        assert spent <= budget
        got = sum(float((v[:r] ** 2).sum()) for v, r in zip(values, ranks, strict=True))
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
    values = [numpy.array([3.0, 2.0, 1.0]), numpy.array([1.0, 0.0])]
    assert allocate(values, [1, 1], 100) == [3, 1]
    assert allocate(values, [1, 1], 100, cap=2) == [2, 1]
    assert allocate([numpy.zeros(2)], [1], 5) == [0]


def test_effective_ranks():
    assert stable_rank(numpy.zeros(3)) == entropy_rank(numpy.zeros(3)) == 0
    assert stable_rank(numpy.ones(5)) == pytest.approx(5)
    assert entropy_rank(numpy.ones(5)) == pytest.approx(5)
    assert entropy_rank(numpy.array([3.0, 1.0])) == pytest.approx(
        math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    )


@pytest.mark.parametrize("shape", [(64, 64), (200, 50), (30, 400)])
def test_noise_stays_below_its_edge(shape):
    random = numpy.random.default_rng(3)
    largest = [norm(random.random(shape) - 0.5, 2) for _ in range(20)]
    edge = noise_edge(math.sqrt(1 / 12), *shape)
    assert max(largest) < edge < 1.2 * max(largest)


# Block Krylov


def spectrum_matrix(random, m, n, values):
    u, v = (numpy.linalg.qr(random.standard_normal((x, len(values)))).Q for x in (m, n))
    return ((u * values) @ v.T).astype(numpy.float32)


def tiles_of(d, height=17):
    return lambda: ((i, d[i : i + height]) for i in range(0, len(d), height))


@pytest.mark.parametrize("shape", [(300, 200), (200, 300)])
@pytest.mark.parametrize(("power", "least"), [(0.6, 0.999), (1.0, 0.9999), (2.0, 0.999999)])
def test_krylov_on_decaying_spectra(random, shape, power, least):
    values = numpy.arange(1, 201) ** -power
    d = spectrum_matrix(random, *shape, values)
    found = block_krylov(tiles_of(d), shape, 16)
    best = float((values[:16] ** 2).sum() / (values**2).sum())
    assert least < found.captured(16) / best <= 1 + 1e-5
    b, a = found.factors(16)
    true = float(norm(d - b @ a) / norm(d)) ** 2
    assert 1 - found.captured(16) == pytest.approx(true, abs=1e-5)  # the certificate
    assert numpy.allclose(norm(b, axis=0), norm(a, axis=1), rtol=1e-3)


@pytest.mark.parametrize("shape", [(1, 1), (5, 1), (1, 5), (6, 4), (4, 6), (33, 32)])
@pytest.mark.parametrize("block", [1, 4, 100])
def test_krylov_on_small_matrices(random, shape, block):
    d = random.standard_normal(shape, numpy.float32)
    found = block_krylov(tiles_of(d, 2), shape, block)
    k = min(block, *shape)
    exact = svdvals(d)
    if block >= min(shape):
        assert numpy.allclose(found.values[:k], exact[:k], rtol=1e-4)
        b, a = found.factors(k)
        assert numpy.allclose(b @ a, d, atol=1e-4)
    assert found.values[0] <= exact[0] * (1 + 1e-5)


def test_krylov_on_exact_low_rank_and_zero(random):
    d = spectrum_matrix(random, 80, 60, numpy.array([3.0, 2.0, 1e-3]))
    found = block_krylov(tiles_of(d), (80, 60), 8)
    assert found.captured(3) == pytest.approx(1)
    assert found.values[2] == pytest.approx(1e-3, rel=1e-2)
    zero = block_krylov(tiles_of(numpy.zeros((8, 6), numpy.float32)), (8, 6), 2)
    assert (zero.captured(2), zero.squared_norm) == (1.0, 0.0)
    assert not zero.factors(2)[0].any()


# Interference


@pytest.mark.parametrize("keep", [1, 2, 50, 99, 100])
def test_threshold_is_the_kth_largest(random, keep):
    d = random.standard_normal((10, 10), numpy.float32)
    d[0, :3] = d[1, 0]
    expected = numpy.sort(abs(d).ravel())[-keep]
    assert magnitude_threshold(tiles_of_only(d), keep) == float(expected)
    assert int((prune(d, float(expected)) != 0).sum()) >= keep


def tiles_of_only(d):
    return lambda: (d[i : i + 3] for i in range(0, len(d), 3))


def test_drop_keeps_the_mean():
    random = numpy.random.default_rng(0)
    dropped = drop(numpy.ones(100_000), 0.2, random)
    assert set(dropped.tolist()) == {0.0, 5.0}
    assert float(dropped.mean()) == pytest.approx(1, abs=0.03)


def test_elect():
    one, other = numpy.array([[3.0, -1.0, 0.0, 2.0], [-1.0, -2.0, 5.0, 2.0]])
    assert elect([one, other]).tolist() == [3.0, -1.5, 5.0, 2.0]


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("experts", [(), (3,)])
def test_rounding_error_is_that_of_the_rounded_product(dtype, experts):
    random, dtype = numpy.random.default_rng(1), numpy_dtype(dtype)
    b = random.standard_normal((*experts, 40, 6))
    a = random.standard_normal((*experts, 6, 30))
    near = b.astype(dtype).astype(float) @ a.astype(dtype).astype(float)
    wanted = float(norm(b @ a - near) / norm(b @ a))
    assert lora.rounding_error(b, a, dtype) == pytest.approx(wanted, rel=1e-6)
    assert lora.rounding_error(0 * b, a, dtype) == 0
