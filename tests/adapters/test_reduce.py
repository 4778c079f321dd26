"""Rank reduction of whole adapters."""

from dataclasses import replace

import pytest
import torch

from loraformat.errors import InputError, UsageError
from loraformat.model.checkpoint import CarriedFile
from loraformat.ops.reduce import Reduction, reduce_adapter
from loraformat.testing import dense
from tests.adapters.memory_adapters import adapter, delta, distance, effect, effects, random_adapter
from tests.torch_tensors import numbers


def best_error(d, k):
    s = torch.linalg.svdvals(d)
    return float(s[k:].norm() / s.norm())


@pytest.mark.parametrize("rank", [1, 3, 4])
def test_rank_is_optimal_and_scaling_folded(rank):
    before = random_adapter()
    after, report = reduce_adapter(before, Reduction(rank=rank))
    for (target, d), module in zip(effects(before).items(), report.modules, strict=True):
        small = after.deltas[target]
        assert (small.rank, small.scaling, small.alpha) == (rank, 1.0, rank)
        assert small.a.shape == (rank, d.shape[1])
        assert small.b.shape == (d.shape[0], rank)
        assert distance(effect(small), d) == pytest.approx(best_error(d, rank), abs=1e-6)
        assert module.error == pytest.approx(best_error(d, rank), abs=1e-6)
        assert module.energy == pytest.approx(1 - module.error**2)
    assert report.new_parameters == sum(x.parameters for x in after.deltas.values())
    assert report.old_parameters == sum(x.parameters for x in before.deltas.values())
    assert report.to_dict()["modules"][0]["new_rank"] == rank


def test_any_prefix_is_the_smaller_adapter():
    before = random_adapter()
    after, _ = reduce_adapter(before, Reduction(rank=4))
    for target, d in effects(before).items():
        b, a = (
            numbers(after.deltas[target].b).double(),
            numbers(after.deltas[target].a).double(),
        )
        for k in (1, 2, 3):
            assert distance(b[:, :k] @ a[:k], d) == pytest.approx(best_error(d, k), abs=1e-6)


def test_a_rank_larger_than_there_is():
    before = random_adapter()
    after, report = reduce_adapter(before, Reduction(rank=7))
    assert [x.rank for x in after.deltas.values()] == [6, 6, 4, 7]
    assert any("3 modules have a rank below 7" in note for note in report.notes)
    for target, d in list(effects(before).items())[:3]:
        assert distance(effect(after.deltas[target]), d) < 1e-6


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99, 1.0])
def test_energy(energy):
    before = random_adapter()
    after, report = reduce_adapter(before, Reduction(energy=energy))
    for module in report.modules:
        d = effect(before.deltas[module.target])
        s = torch.linalg.svdvals(d).square()
        assert module.energy >= energy - 1e-12
        assert float(s[: module.new_rank - 1].sum() / s.sum()) < energy
        kept = 1 - distance(effect(after.deltas[module.target]), d) ** 2
        assert kept == pytest.approx(module.energy, abs=1e-5)


def test_budget_goes_where_it_holds_most():
    before = random_adapter()
    after, report = reduce_adapter(before, Reduction(budget=500, max_rank=5))
    assert report.new_parameters <= 500
    assert sum(x.parameters for x in after.deltas.values()) == report.new_parameters
    assert max(module.new_rank for module in report.modules) <= 5
    uniform, same = reduce_adapter(before, Reduction(rank=2))
    assert same.new_parameters <= 500
    assert report.energy > same.energy
    del uniform


def test_budget_drops_what_holds_nothing():
    weak = replace(random_adapter().deltas["model.layers.0.self_attn.q_proj.weight"], scaling=1e-9)
    before = random_adapter()
    before.deltas[weak.target] = weak
    after, report = reduce_adapter(before, Reduction(budget=300))
    assert weak.target not in after.deltas
    assert any("modules were omitted" in note for note in report.notes)


def test_max_rank_alone_drops_empty_ranks():
    b, a = torch.randn(10, 2), torch.randn(2, 12)
    before = adapter(
        delta("x.weight", torch.cat([b, b], 1), torch.cat([a, a], 0)),
        delta("y.weight", torch.randn(10, 6), torch.randn(6, 12)),
        delta("z.weight", torch.zeros(10, 6), torch.randn(6, 12)),
    )
    after, report = reduce_adapter(before, Reduction(max_rank=4))
    assert {t: x.rank for t, x in after.deltas.items()} == {"x.weight": 2, "y.weight": 4}
    assert [module.new_rank for module in report.modules] == [2, 4, 0]
    assert distance(effect(after.deltas["x.weight"]), 2 * (b @ a).double()) < 1e-6


def test_zero_deltas():
    zero = adapter(delta("x.weight", torch.zeros(10, 4), torch.randn(4, 12)))
    after, report = reduce_adapter(zero, Reduction(rank=2))
    assert after.deltas["x.weight"].rank == 2
    assert not effect(after.deltas["x.weight"]).any()
    assert report.modules[0].error == 0
    with pytest.raises(InputError, match="nothing remains"):
        reduce_adapter(zero, Reduction(energy=0.9))


def test_statistics_make_it_activation_aware():
    random = torch.Generator().manual_seed(5)
    b, a = torch.randn(24, 8, generator=random), torch.randn(8, 20, generator=random)
    x = torch.randn(20, 500, generator=random) * torch.logspace(0, -2, 20)[:, None]
    z = a @ x
    moment = dense("moment", z @ z.T / 500)
    before = adapter(delta("x.weight", b, a, 0.5, second_moment=moment))
    aware, report = reduce_adapter(before, Reduction(rank=3))
    plain, plain_report = reduce_adapter(before, Reduction(rank=3, statistics=False))
    wanted = effect(before.deltas["x.weight"]) @ x.double()

    def output_error(smaller):
        return distance(effect(smaller.deltas["x.weight"]) @ x.double(), wanted)

    assert report.modules[0].activation_aware
    assert not plain_report.modules[0].activation_aware
    assert report.modules[0].error == pytest.approx(output_error(aware), rel=1e-4)
    assert output_error(aware) < 0.9 * output_error(plain)
    for smaller in (aware, plain):  # the moment is that of the new inner activations
        z = numbers(smaller.deltas["x.weight"].a) @ x
        found = numbers(smaller.deltas["x.weight"].second_moment)
        assert distance(found, z @ z.T / 500) < 1e-4
    again, _ = reduce_adapter(aware, Reduction(rank=2))
    direct, _ = reduce_adapter(before, Reduction(rank=2))
    assert output_error(again) == pytest.approx(output_error(direct), rel=1e-4)


def test_a_budget_measures_all_modules_alike():
    before = random_adapter()
    target = next(iter(before.deltas))
    moment = dense("moment", torch.eye(6))
    before.deltas[target] = replace(before.deltas[target], second_moment=moment)
    _, report = reduce_adapter(before, Reduction(budget=400))
    assert not any(module.activation_aware for module in report.modules)
    assert any("one measure for all modules" in note for note in report.notes)
    _, mixed = reduce_adapter(before, Reduction(rank=2))
    assert mixed.energy is None


def test_experts_are_reduced_one_by_one():
    random = torch.Generator().manual_seed(2)
    b, a = torch.randn(3, 10, 4, generator=random), torch.randn(3, 4, 12, generator=random)
    before = adapter(delta("experts.up_proj", b, a, 2.0))
    after, report = reduce_adapter(before, Reduction(rank=2))
    small = after.deltas["experts.up_proj"]
    assert (small.a.shape, small.b.shape) == ((3, 2, 12), (3, 10, 2))
    for e, d in enumerate(effect(before.deltas["experts.up_proj"])):
        error = distance(effect(small)[e], d)
        assert error == pytest.approx(best_error(d, 2), abs=1e-6)
    whole = distance(effect(small), effect(before.deltas["experts.up_proj"]))
    assert report.modules[0].error == pytest.approx(whole, abs=1e-6)
    _, dear = reduce_adapter(before, Reduction(budget=100))
    assert dear.new_parameters <= 100


def test_magnitudes_and_biases_travel():
    change = delta(
        "x.weight", torch.zeros(10, 4), torch.randn(4, 12), 2.0,
        magnitude=dense("m", torch.rand(10)), bias=dense("b", torch.ones(10)),
    )  # fmt: skip
    after, report = reduce_adapter(adapter(change), Reduction(energy=0.9))
    small = after.deltas["x.weight"]
    assert small.rank == 1
    assert torch.equal(numbers(small.magnitude), numbers(change.magnitude))
    assert torch.equal(numbers(small.bias), torch.full((10,), 2.0))  # 2 · 1, folded
    assert any("DoRA" in note for note in report.notes)


@pytest.mark.parametrize(
    ("stored", "wanted", "result"),
    [("bfloat16", None, "BF16"), ("float16", None, "F16"), ("float64", None, "F32"),
     ("bfloat16", "f32", "F32"), ("float32", "bf16", "BF16")],
)  # fmt: skip
def test_dtypes(stored, wanted, result):
    kind = getattr(torch, stored)
    before = adapter(delta("x.weight", torch.randn(10, 4).to(kind), torch.randn(4, 12).to(kind)))
    after, _ = reduce_adapter(before, Reduction(rank=2, dtype=wanted))
    assert after.deltas["x.weight"].a.dtype == after.deltas["x.weight"].b.dtype == result
    assert after.deltas["x.weight"].a.nbytes == len(after.deltas["x.weight"].a.load())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite(bad):
    b = torch.randn(10, 4)
    b[3, 1] = bad
    with pytest.raises(InputError, match="holds NaN or infinity"):
        reduce_adapter(adapter(delta("x.weight", b, torch.randn(4, 12))), Reduction(rank=2))


@pytest.mark.parametrize(
    "members",
    [{}, {"rank": 2, "energy": 0.5}, {"rank": 2, "budget": 5}, {"rank": 2, "max_rank": 3},
     {"rank": 0}, {"energy": 0}, {"energy": 1.5}, {"budget": 0}, {"max_rank": 0}],
)  # fmt: skip
def test_options_that_contradict(members):
    with pytest.raises(UsageError):
        Reduction(**members)


def test_factors_are_computed_once_per_module_and_only_when_loaded(monkeypatch):
    from loraformat.algebra import lora

    calls = []
    original = lora.core
    monkeypatch.setattr(lora, "core", lambda *args: calls.append(1) or original(*args))
    after, _ = reduce_adapter(random_adapter(), Reduction(rank=2))
    assert not calls
    for change in after.deltas.values():
        change.a.load()
        change.b.load()
    assert len(calls) == 4


def test_nothing_that_described_the_old_deltas_is_left():
    before = replace(
        random_adapter(),
        config={"task_type": "CAUSAL_LM", "r": 6, "lora_alpha": 12, "use_rslora": True,
                "rank_pattern": {"x": 4}, "alpha_pattern": {"x": 8}},
        files=tuple(
            CarriedFile(name, 1, lambda: b"x")
            for name in ("adapter_model.safetensors", "adapter_config.json", "tokenizer.json")
        ),
    )  # fmt: skip
    after, _ = reduce_adapter(before, Reduction(rank=2))
    assert after.config == {"task_type": "CAUSAL_LM"}
    assert [file.path for file in after.files] == ["tokenizer.json"]
