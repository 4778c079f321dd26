"""Extraction: planted adapters come back, up to the rounding of the checkpoint."""

import pytest
import torch

from loraformat.errors import InputError, UsageError
from loraformat.ops.extract.extract import ExtractOptions, extract_adapter
from loraformat.ops.reduce import Reduction, reduce_adapter
from loraformat.tensors.torch_arrays import tensor_of
from loraformat.testing import checkpoint, dense, nf4
from tests.adapters.memory_adapters import distance, effect
from tests.torch_tensors import numbers

Q = "model.layers.0.self_attn.q_proj.weight"


def planted(random, m, n, rank, relative, weight):
    d = torch.randn(m, rank, generator=random) @ torch.randn(rank, n, generator=random)
    return d * (relative * weight.norm() / d.norm())


def pair(m=192, n=256, rank=6, relative=0.03, dtype=torch.bfloat16, name=Q, **config):
    """Base, fine-tune, and the delta that was added before rounding."""
    random = torch.Generator().manual_seed(0)
    weight = (torch.randn(m, n, generator=random) * 0.02).to(dtype)
    d = planted(random, m, n, rank, relative, weight.float())
    base = checkpoint(dense(name, weight), config=config)
    return base, checkpoint(dense(name, (weight.float() + d).to(dtype)), config=config), d


def extract(base, tuned, **members):
    return extract_adapter(base, tuned, ExtractOptions(**members))


@pytest.mark.parametrize("relative", [0.01, 0.03, 0.1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_auto_stops_at_the_noise_edge(relative, dtype):
    base, tuned, d = pair(relative=relative, dtype=dtype)
    found, report = extract(base, tuned, rank="auto", dtype="f32")
    assert report.modules[0].rank == 6
    raw = (numbers(tuned.tensors[Q]).float() - numbers(base.tensors[Q]).float()).double()
    error = distance(effect(found.deltas[Q]), d.double())
    assert error < 0.5 * distance(raw, d.double())  # nearer to the truth than the difference
    more, _ = extract(base, tuned, rank=64, dtype="f32")
    assert error < distance(effect(more.deltas[Q]), d.double())


def test_auto_leaves_noise_out():
    base, _, _ = pair()
    weight = numbers(base.tensors[Q]).float()
    random = torch.Generator().manual_seed(4)
    jitter = (torch.rand(weight.shape, generator=random) - 0.5) * weight.abs() * 2**-8
    tuned = checkpoint(dense(Q, (weight + jitter).bfloat16()))
    with pytest.raises(InputError, match="does not differ"):
        extract(base, tuned, rank="auto")


@pytest.mark.parametrize("members", [{}, {"rank": 8}, {"rank": "auto"}, {"energy": 0.9}])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_becomes_no_module_at_any_rank(members, dtype):
    base, tuned, _ = pair(dtype=dtype)
    random = torch.Generator().manual_seed(3)
    exact = torch.randn(64, 48, generator=random) * 1e-4  # subnormal in float16
    head = "lm_head.weight"
    before = checkpoint(*base.tensors.values(), dense(head, exact))
    after = checkpoint(*tuned.tensors.values(), dense(head, exact.to(dtype)))
    found, report = extract(before, after, **members)
    assert list(found.deltas) == [Q]
    assert [m.rank for m in report.modules if m.target == head] == [0]
    assert any("only by rounding noise" in note for note in report.notes)


def test_auto_is_the_default():
    assert ExtractOptions().rank == "auto"
    assert ExtractOptions(energy=0.5).rank is None


@pytest.mark.parametrize("members", [{}, {"rank": 4}, {"energy": 0.99}])
def test_the_error_is_that_of_the_factors_as_they_are_stored(members):
    base, tuned, _ = pair(rank=4, relative=0.2)
    raw = (numbers(tuned.tensors[Q]).float() - numbers(base.tensors[Q]).float()).double()
    found, report = extract(base, tuned, dtype="bf16", **members)
    assert report.modules[0].error == pytest.approx(
        distance(effect(found.deltas[Q]), raw), abs=2e-4
    )


def test_what_a_stored_dtype_cannot_hold_is_refused():
    base = checkpoint(dense(Q, torch.zeros(8, 8)))
    tuned = checkpoint(dense(Q, torch.full((8, 8), 1e12)))
    with pytest.raises(InputError, match=r"range of F16.*--dtype f32"):
        extract(base, tuned, rank=1, dtype="f16")


def test_a_fixed_rank_is_nearly_optimal_and_certified():
    base, tuned, _ = pair(rank=40)
    raw = (numbers(tuned.tensors[Q]).float() - numbers(base.tensors[Q]).float()).double()
    s = torch.linalg.svdvals(raw)
    for rank in (1, 8, 32, 500):
        found, report = extract(base, tuned, rank=rank, dtype="f32")
        module = report.modules[0]
        assert module.rank == min(rank, 192)
        error = distance(effect(found.deltas[Q]), raw)
        assert module.error == pytest.approx(error, abs=1e-3)
        assert error**2 <= 1.001 * float(s[rank:].square().sum() / s.square().sum()) + 1e-6
        assert module.norm == pytest.approx(float(raw.norm()), rel=1e-5)


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.98])
def test_energy(energy):
    base, tuned, _ = pair(rank=40)
    raw = (numbers(tuned.tensors[Q]).float() - numbers(base.tensors[Q]).float()).double()
    _, report = extract(base, tuned, energy=energy)
    s = torch.linalg.svdvals(raw).square()
    best = int((s.cumsum(0) < energy * s.sum()).sum()) + 1
    assert best <= report.modules[0].rank <= best + 1
    assert report.modules[0].captured >= energy - 1e-5
    _, capped = extract(base, tuned, energy=energy, max_rank=3)
    assert (capped.modules[0].rank, capped.modules[0].capped) == (3, True)
    assert any("more than rank 3" in note for note in capped.notes)


@pytest.mark.parametrize("block", [32, 200])
def test_auto_finds_more_than_its_first_block(block):
    base, tuned, _ = pair(rank=block // 4 + 40, relative=0.2, dtype=torch.float16)
    _, report = extract(base, tuned, rank="auto")
    assert report.modules[0].rank == block // 4 + 40


def test_transposed_weights():
    for name, model_type in (
        ("transformer.h.0.attn.c_attn.weight", "gpt2"),
        ("model.embed_tokens.weight", "llama"),
    ):
        base, tuned, d = pair(name=name, model_type=model_type)
        found, _ = extract(base, tuned, rank=6, dtype="f32")
        change = found.deltas[name]
        assert change.orientation == "transposed"
        assert (change.in_features, change.out_features) == d.shape
        assert distance(effect(change).T, d.double()) < 0.1
    base, tuned, d = pair(name="lm_head.weight")
    found, _ = extract(base, tuned, rank=6, dtype="f32")
    assert found.deltas["lm_head.weight"].orientation == "linear"


@pytest.mark.parametrize(("model_type", "orientation"), [("mixtral", "linear"),
                                                         ("gpt_oss", "transposed")])  # fmt: skip
def test_experts(model_type, orientation):
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 40, 50, generator=random)
    d = torch.stack([planted(random, 40, 50, e + 1, 0.1, weight[e]) for e in range(3)])
    name = "model.layers.0.mlp.experts.gate_up_proj"
    config = {"model_type": model_type}
    found, report = extract(
        checkpoint(dense(name, weight), config=config),
        checkpoint(dense(name, weight + d), config=config), energy=0.9999,
    )  # fmt: skip
    change = found.deltas[name]
    assert (change.orientation, change.rank) == (orientation, 3)
    full = effect(change) if orientation == "linear" else effect(change).mT
    assert distance(full, d.double()) < 0.02
    assert report.modules[0].captured > 0.9999


def test_nf4_base_is_dequantized():
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(192, 256, generator=random) * 0.02
    base = checkpoint(nf4(Q, weight))
    d = planted(random, 192, 256, 4, 0.2, weight)
    plain = tensor_of(base.tensors[Q].dequantize())
    tuned = checkpoint(dense(Q, plain + d))
    found, report = extract(base, tuned, rank=4)
    assert distance(effect(found.deltas[Q]), d.double()) < 1e-4
    # Where the fine-tune began at the dequantized weights, their error is not in the difference.
    small = planted(random, 192, 256, 4, 0.01, weight)
    tuned = checkpoint(dense(Q, plain + small))
    found, report = extract(base, tuned)
    assert report.modules[0].rank == 4
    assert distance(effect(found.deltas[Q]), small.double()) < 1e-3
    # The quantization error is noise to a base in NF4: no rank is spent on it.
    tuned = checkpoint(dense(Q, weight + d))
    _, report = extract(base, tuned, rank="auto")
    assert report.modules[0].rank == 4


def everything():
    def norm(value):
        return dense("model.norm.weight", torch.full((64,), value))

    keep = dense("model.layers.0.mlp.up_proj.weight", torch.ones(8, 64))
    base = checkpoint(
        pair(64, 64)[0].tensors[Q], keep, norm(1.0),
        dense("model.layers.0.self_attn.q_proj.bias", torch.zeros(64)),
        dense("model.embed_tokens.weight", torch.ones(20, 64)),
        dense("conv.weight", torch.ones(2, 2, 3, 3)), dense("ids", torch.arange(3)),
        dense("only.base.weight", torch.ones(2, 2)), dense("narrow.weight", torch.ones(4, 4)),
    )  # fmt: skip
    tuned = checkpoint(
        pair(64, 64)[1].tensors[Q], keep, norm(1.5),
        dense("model.layers.0.self_attn.q_proj.bias", torch.ones(64)),
        dense("model.embed_tokens.weight", torch.ones(23, 64)),
        dense("conv.weight", torch.zeros(2, 2, 3, 3)), dense("ids", torch.arange(3) + 1),
        dense("only.tuned.weight", torch.ones(2, 2)), dense("narrow.weight", torch.ones(4, 5)),
    )  # fmt: skip
    return base, tuned


def test_everything_is_handled_or_listed():
    base, tuned = everything()
    found, report = extract(base, tuned, rank=2)
    assert list(found.deltas) == [Q]
    assert report.replaced == sorted(found.replacements) == [
        "model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.bias", "model.norm.weight",
    ]  # fmt: skip
    assert report.unchanged == 1
    assert report.left_out == {
        "conv.weight": "changed, and is neither a matrix nor a vector",
        "ids": "changed, but is not real-valued (I64)",
        "narrow.weight": "changed its shape from 4x4 to 4x5",
        "only.base.weight": "exists only in the base",
        "only.tuned.weight": "exists only in the fine-tune",
    }
    assert any("grew from 20 to 23 rows" in note for note in report.notes)
    assert numbers(found.replacements["model.norm.weight"])[0] == 1.5
    assert report.to_dict()["modules"][0]["target"] == Q
    skipped, _ = extract(base, tuned, rank=2, skip=("*.q_proj.*", "model.n*"))
    assert not skipped.deltas
    assert list(skipped.replacements) == ["model.embed_tokens.weight"]


def test_the_result_can_be_reduced_after_the_models_are_closed():
    base, tuned, _ = pair()
    found, _ = extract(base, tuned, rank=16)
    with found:
        smaller, _ = reduce_adapter(found, Reduction(rank=2))
        assert smaller.deltas[Q].a.dtype == "BF16"
        assert effect(smaller.deltas[Q]).isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", [0, 1])
def test_not_finite(bad, side):
    models = list(pair(64, 64)[:2])
    values = numbers(models[side].tensors[Q]).clone()
    values[3, 4] = bad
    models[side] = checkpoint(dense(Q, values))
    with pytest.raises(InputError, match="not finite"):
        extract(*models, rank=2)


def test_models_that_are_strangers_or_the_same():
    base, _, _ = pair(8, 8)
    with pytest.raises(InputError, match="no tensor in common"):
        extract(base, checkpoint(dense("x", torch.ones(2))), rank=2)
    with pytest.raises(InputError, match="does not differ"):
        extract(base, base, rank=2)


@pytest.mark.parametrize(
    "members", [{"rank": 2, "energy": 0.5}, {"rank": 0}, {"energy": 0}, {"energy": 2},
                {"rank": "auto", "max_rank": 0}]
)  # fmt: skip
def test_options(members):
    with pytest.raises(UsageError):
        ExtractOptions(**members)
