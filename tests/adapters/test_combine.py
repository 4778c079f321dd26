"""Combination, against dense sums and against PEFT where PEFT is right."""

from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch

from loraformat.algebra import subspace
from loraformat.algebra.interference import prune
from loraformat.errors import InputError, UnsupportedError, UsageError
from loraformat.model.adapter import RowReplacement
from loraformat.ops.combine import elementwise
from loraformat.ops.combine.combine import METHODS, CombineOptions, combine_adapters
from loraformat.testing.models import carried, dense
from tests.adapters.memory_adapters import (
    LAYER,
    adapter,
    delta,
    distance,
    effect,
    effects,
    random_adapter,
)
from tests.torch_tensors import numbers

EXACT = ("svd", "cat", "linear")


def combine(adapters, method="svd", weights=None, **members):
    return combine_adapters(adapters, CombineOptions(method, **members), weights=weights)


def weighted_sum(adapters, weights):
    total = {}
    for whole, weight in zip(adapters, weights, strict=True):
        for target, d in effects(whole).items():
            total[target] = total.get(target, 0) + weight * d
    return total


def pair():
    """Different ranks and scalings; the second lacks a module and has one of its own."""
    one, other = random_adapter(0), random_adapter(1, ranks=(3, 5, 8, 2))
    change = other.deltas.pop(LAYER.format(0, "v_proj"))
    extra = LAYER.format(2, "v_proj")
    other.deltas[extra] = replace(change, target=extra)
    return [one, other]


@pytest.mark.parametrize("method", ["cat", "linear"])
@pytest.mark.parametrize("weights", [None, (1, 1), (0.3, -2.0), (0, 1)])
def test_exact_methods_are_the_weighted_sum(method, weights):
    adapters = pair()
    after, report = combine(adapters, method, weights)
    for target, d in weighted_sum(adapters, weights or (1, 1)).items():
        if d.any():
            assert distance(effect(after.deltas[target]), d) < 1e-6
            assert after.deltas[target].scaling == 1.0
    ranks = {module.target: module.rank for module in report.modules}
    assert (
        ranks[LAYER.format(0, "q_proj")]
        == {"cat": 9, "linear": 3 if weights == (0, 1) else 9}[method]
    )
    assert ranks[LAYER.format(2, "v_proj")] == 5


@pytest.mark.parametrize("rank", [None, 2])
def test_svd_is_the_best_of_its_rank(rank):
    adapters = pair()
    after, report = combine(adapters, "svd", (0.5, -1.5), rank=rank)
    for module in report.modules:
        d = weighted_sum(adapters, (0.5, -1.5))[module.target]
        s = torch.linalg.svdvals(d)
        k = module.rank
        assert k == rank or k == max(module.ranks)
        best = float(s[k:].norm() / s.norm())
        assert distance(effect(after.deltas[module.target]), d) == pytest.approx(best, abs=1e-6)
        assert module.error == pytest.approx(best, abs=1e-6)


def test_what_cancels_is_left_out():
    one = random_adapter()
    with pytest.raises(InputError, match="is zero in every module"):
        combine([one, one], "linear", (1, -1))
    other = random_adapter()
    target = next(iter(other.deltas))
    other.deltas[target] = replace(other.deltas[target], scaling=5.0)
    after, report = combine([one, other], "linear", (1, -1))
    assert list(after.deltas) == [target]
    assert any("3 modules cancel" in note for note in report.notes)


def dense_reference(method, deltas, weights, density):
    if method in ("ties", "magnitude_prune"):
        keep = int(density * deltas[0].numel())
        edges = [float(d.abs().flatten().sort().values[-keep]) for d in deltas]
        deltas = [torch.from_numpy(prune(d.numpy(), x)) for d, x in zip(deltas, edges, strict=True)]
    stack = torch.stack([w * d for w, d in zip(weights, deltas, strict=True)])
    if method == "magnitude_prune":
        return stack.sum(0)
    majority = torch.where(stack.sum(0) >= 0, 1, -1)
    mask = stack.sign() == majority
    return (stack * mask).sum(0) / mask.sum(0).clamp(min=1)


@pytest.mark.parametrize("method", ["ties", "magnitude_prune"])
@pytest.mark.parametrize("weights", [(1, 1), (0.7, -0.4)])
def test_pruning_methods_against_dense(method, weights):
    adapters = [random_adapter(0), random_adapter(1)]
    after, report = combine(adapters, method, weights, rank=16, density=0.4)
    for target, change in after.deltas.items():
        deltas = [effect(whole.deltas[target]) for whole in adapters]
        d = dense_reference(method, deltas, weights, 0.4)
        if min(d.shape) == 16:  # of full rank: nothing is approximated
            assert distance(effect(change), d) < 1e-5
    small, report = combine(adapters, method, weights, rank=3, density=0.4)
    for module in report.modules:
        deltas = [effect(whole.deltas[module.target]) for whole in adapters]
        d = dense_reference(method, deltas, weights, 0.4)
        error = distance(effect(small.deltas[module.target]), d)
        s = torch.linalg.svdvals(d)
        assert module.error == pytest.approx(error, abs=1e-4)
        assert error <= 1.02 * float(s[3:].norm() / s.norm())


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare(method):
    adapters = [random_adapter(0), random_adapter(1)]
    full, _ = combine(adapters, method, rank=16, density=1.0)
    for target, change in full.deltas.items():
        deltas = [effect(whole.deltas[target]) for whole in adapters]
        expected = (
            sum(deltas)
            if method == "dare_linear"
            else dense_reference("dare_ties", deltas, (1, 1), 1)
        )
        assert distance(effect(change), expected) < 1e-5
    one, _ = combine(adapters, method, density=0.5, seed=3)
    same, _ = combine(adapters, method, density=0.5, seed=3)
    other, _ = combine(adapters, method, density=0.5, seed=4)
    for target in one.deltas:
        assert torch.equal(effect(one.deltas[target]), effect(same.deltas[target]))
        assert not torch.equal(effect(one.deltas[target]), effect(other.deltas[target]))


def test_equal_modules_drop_different_elements():
    b, a = torch.ones(20, 1), torch.ones(1, 20)
    whole = adapter(delta("x.weight", b, a), delta("y.weight", b, a))
    after, _ = combine([whole], "dare_linear", rank=20)
    assert not torch.equal(effect(after.deltas["x.weight"]), effect(after.deltas["y.weight"]))


@pytest.mark.parametrize("method", METHODS)
def test_experts(method):
    def experts(seed):
        random = torch.Generator().manual_seed(seed)
        b = torch.randn(3, 10, 2, generator=random)
        return adapter(delta("e", b, torch.randn(3, 2, 12, generator=random), 2.0))

    whole = [experts(0), experts(1)]
    density = {"density": 1.0}
    after, _ = combine(whole, method, **({} if method == "cat" else {"rank": 10}), **density)
    found = effect(after.deltas["e"])
    assert found.shape == (3, 10, 12)
    if method not in ("ties", "dare_ties"):
        assert distance(found, weighted_sum(whole, (1, 1))["e"]) < 1e-5


def test_biases_add_up():
    one = adapter(delta("x", torch.randn(4, 1), torch.randn(1, 4), 2.0,
                        bias=dense("b", torch.ones(4))))  # fmt: skip
    other = adapter(delta("x", torch.randn(4, 1), torch.randn(1, 4), 1.0,
                          bias=dense("b", torch.ones(4))))  # fmt: skip
    after, _ = combine([one, other], "cat", (1, -0.5))
    assert numbers(after.deltas["x"].bias).tolist() == [1.5] * 4


# Refusals


def test_dora_is_refused_with_the_remedy():
    one = adapter(delta("x", torch.randn(4, 1), torch.randn(1, 4),
                        magnitude=dense("m", torch.ones(4))))  # fmt: skip
    with pytest.raises(UnsupportedError, match=r"DoRA.*loraformat merge, then extract"):
        combine([one, one])


def with_head(value, shape=(2, 2), kind=torch.float32):
    head = dense("lm_head.weight", torch.full(shape, value, dtype=kind))
    return adapter(
        delta("x", torch.ones(4, 1), torch.ones(1, 4)), replacements={"lm_head.weight": head}
    )


def with_rows(value, indices=(3, 5)):
    rows = RowReplacement("embed", indices, dense("rows", torch.full((2, 4), value)))
    return adapter(delta("x", torch.ones(4, 1), torch.ones(1, 4)), rows={"embed": rows})


def test_equal_whole_tensors_are_kept():
    after, report = combine([with_head(1.0), with_head(1.0), random_adapter()])
    assert torch.equal(numbers(after.replacements["lm_head.weight"]), torch.ones(2, 2))
    assert any("same values in 2 adapters" in note for note in report.notes)
    after, _ = combine([with_rows(1.0), with_rows(1.0)], "ties")
    assert torch.equal(numbers(after.rows["embed"].rows), torch.ones(2, 4))


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_whole_tensors_have_a_mean_if_the_weights_add_up_to_one(kind):
    """W + Σ wᵢ(Wᵢ − W) = Σ wᵢ Wᵢ, whatever W is, if Σ wᵢ = 1."""
    adapters = [with_head(1.0, kind=kind), with_head(3.0, kind=kind), random_adapter()]
    after, report = combine(adapters, "cat", [1.5, -0.5, 7.0])
    found = after.replacements["lm_head.weight"]
    assert numbers(found).dtype == kind
    assert torch.equal(numbers(found), torch.zeros(2, 2, dtype=kind))
    assert any("weighted mean of 2 adapters" in note for note in report.notes)
    after, _ = combine([with_rows(1.0), with_rows(2.0)], "svd", [0.5, 0.5])
    assert torch.equal(numbers(after.rows["embed"].rows), torch.full((2, 4), 1.5))
    after, _ = combine([with_rows(2.0), random_adapter()], "svd", [1.0, 0.5])
    assert torch.equal(numbers(after.rows["embed"].rows), torch.full((2, 4), 2.0))


@pytest.mark.parametrize(
    ("adapters", "method", "weights", "why"),
    [
        ((with_head(1.0), with_head(2.0)), "svd", (1, 1), "sum to 2, not 1"),
        ((with_head(1.0),), "svd", (0.5,), "sum to 0.5, not 1"),
        ((with_head(1.0), with_head(2.0)), "ties", (0.5, 0.5), "needs the base"),
        ((with_head(1.0), with_head(1.0, (3, 2))), "svd", (0.5, 0.5), "shapes 2x2 and 3x2"),
        ((with_rows(1.0), with_rows(1.0, (3, 6))), "svd", (0.5, 0.5), "replaces different rows"),
    ],
)
def test_whole_tensors_without_a_sum(adapters, method, weights, why):
    with pytest.raises(UnsupportedError, match=why) as caught:
        combine(adapters, method, weights)
    assert "lm_head.weight" in str(caught.value) or "embed" in str(caught.value)


def test_cat_rounds_nothing_that_it_need_not():
    """bfloat16 factors, weights that are powers of two: the same digits come out."""
    one, other = (
        adapter(*(
            replace(d, a=dense("a", numbers(d.a).bfloat16()), b=dense("b", numbers(d.b).bfloat16()))
            for d in random_adapter(seed, scalings=(1.0, 2.0, 0.5, -4.0)).deltas.values()
        ))
        for seed in (0, 1)
    )  # fmt: skip
    after, _ = combine([one, other], "cat", (0.125, -2.0))
    for target, change in after.deltas.items():
        assert change.a.dtype == "BF16"
        d = 0.125 * effect(one.deltas[target]) - 2 * effect(other.deltas[target])
        assert torch.allclose(effect(change), d, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("method", ["ties", "magnitude_prune", "dare_ties", "dare_linear"])
def test_tiles_change_nothing(monkeypatch, method):
    """Thresholds, random numbers and sums are those of the matrix, however it is cut."""
    whole = [random_adapter(0), random_adapter(1)]
    before, _ = combine(whole, method, (1, -0.5), seed=5)
    monkeypatch.setattr(elementwise, "_TILE_ELEMENTS", 50)
    for kept in (1 << 20, 0):  # remembered between passes, and computed anew
        monkeypatch.setattr(subspace, "_HELD_BYTES", kept)
        after, _ = combine(whole, method, (1, -0.5), seed=5)
        for target, change in after.deltas.items():
            assert distance(effect(change), effect(before.deltas[target])) < 1e-5


def test_disagreements():
    one = adapter(delta("x", torch.ones(4, 1), torch.ones(1, 4)))
    wide = adapter(delta("x", torch.ones(4, 1), torch.ones(1, 5)))
    turned = adapter(replace(one.deltas["x"], orientation="transposed"))
    for other in (wide, turned):
        with pytest.raises(InputError, match="for the same base"):
            combine([one, other])
    _, report = combine([replace(one, base_model="a"), replace(one, base_model="b")])
    assert any("different bases: a, b" in note for note in report.notes)


@pytest.mark.parametrize(
    "members", [{"method": "mean"}, {"method": "cat", "rank": 3}, {"rank": 0}, {"density": 0},
                {"density": 1.1}]
)  # fmt: skip
def test_options(members):
    with pytest.raises(UsageError):
        CombineOptions(**members)


@pytest.mark.parametrize("weights", [[1], [1, 2, 3], [1, float("nan")]])
def test_weights(weights):
    with pytest.raises(UsageError):
        combine(pair(), weights=weights)


# PEFT


def peft_pair(rslora=False, patterns=False):
    """A model with adapters p and q in PEFT, and the same in memory, with their scalings."""
    peft = import_module("peft")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(20, 24, bias=False))
    wholes = []
    for name, r, alpha in (("p", 4, 8), ("q", 4 if not patterns else 3, 4)):
        config = peft.LoraConfig(
            r=r, lora_alpha=alpha, target_modules=["0"], use_rslora=rslora,
            alpha_pattern={"0": 2 * alpha} if patterns else {},
        )  # fmt: skip
        if name == "p":
            model = peft.get_peft_model(model, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
        layer = model.base_model.model[0]
        with torch.no_grad():
            layer.lora_B[name].weight.normal_()
        b, a = layer.lora_B[name].weight.detach(), layer.lora_A[name].weight.detach()
        wholes.append(adapter(delta("0.weight", b, a, layer.scaling[name])))
    return model, wholes


def peft_delta(model, method, weights, **options):
    model.add_weighted_adapter(["p", "q"], list(weights), "merged", combination_type=method,
                               **options)  # fmt: skip
    return model.base_model.model[0].get_delta_weight("merged").detach().double()


@pytest.mark.parametrize("ours", ["svd", "cat"])
@pytest.mark.parametrize("patterns", [False, True])
def test_peft_agrees_on_plain_lora(ours, patterns):
    model, wholes = peft_pair(patterns=patterns)
    expected = peft_delta(model, ours, (0.5, 2.0))
    after, _ = combine(wholes, ours, (0.5, 2.0))
    assert distance(effect(after.deltas["0.weight"]), expected) < 1e-5


@pytest.mark.parametrize("ours", ["ties", "magnitude_prune"])
def test_peft_agrees_on_pruned_deltas(ours):
    model, wholes = peft_pair()
    options = {"majority_sign_method": "total"} if ours == "ties" else {}
    expected = peft_delta(model, f"{ours}_svd", (1.0, 1.0), density=0.5, svd_rank=20, **options)
    after, _ = combine(wholes, ours, density=0.5, rank=20)
    assert distance(effect(after.deltas["0.weight"]), expected) < 1e-4


@pytest.mark.parametrize("method", ["svd", "cat", "linear"])
def test_peft_is_wrong_on_rslora(method):
    """peft#3761: the merged adapter is scaled as rsLoRA once more; ours is the exact sum."""
    model, wholes = peft_pair(rslora=True)
    d = weighted_sum(wholes, (1.0, 1.0))["0.weight"]
    after, _ = combine(wholes, method, rank=None if method == "cat" else 8)
    assert distance(effect(after.deltas["0.weight"]), d) < 1e-6
    options = {"svd_rank": 8} if method == "svd" else {}
    assert distance(peft_delta(model, method, (1.0, 1.0), **options), d) > 0.5


def test_peft_linear_has_cross_terms():
    model, wholes = peft_pair()
    d = weighted_sum(wholes, (1.0, 1.0))["0.weight"]
    after, _ = combine(wholes, "linear")
    assert distance(effect(after.deltas["0.weight"]), d) < 1e-6
    assert distance(peft_delta(model, "linear", (1.0, 1.0)), d) > 0.5


def with_files(whole, path, **texts):
    """An adapter with files beside it, by their names with ``__`` for a dot."""
    files = [carried(name.replace("__", "."), text.encode()) for name, text in texts.items()]
    return replace(whole, path=Path(path), files=tuple(files))


VOCABULARY = '{"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": %s}'
PLAIN = {
    "tokenizer__json": VOCABULARY % "[]",
    "chat_template__jinja": "{{ messages }}\n",
    "generation_config__json": '{"eos_token_id": [1]}',
}
OTHERS = {
    "tokens": ({"tokenizer__json": VOCABULARY % '[{"id": 2, "content": "<c>"}]'},
               "its tokenizer has <c>, which the first one's has not"),
    "template": ({"chat_template__jinja": "{{ other }}"}, "its chat template differs from"),
    "ends": ({"generation_config__json": '{"eos_token_id": [1, 0]}'}, "end with the tokens 1, 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("method", ["svd", "ties"])
def test_another_tokenizer_is_named_and_the_order_chooses(name, method):
    change, sentence = OTHERS[name]
    one, other = (random_adapter(seed) for seed in (0, 1))
    one = with_files(one, "one", **PLAIN)
    other = with_files(other, "other", **{**PLAIN, **change})
    first, report = combine([one, other], method)
    (note,) = (note for note in report.notes if note.startswith("other: "))
    assert sentence in note and "list other first" in note
    second, report = combine([other, one], method)  # which is the remedy
    covered = name == "tokens"  # by those of the first
    assert any(note.startswith("one: ") for note in report.notes) != covered
    for result, source in ((first, one), (second, other)):
        found = {file.path: file.read() for file in result.files}
        assert found == {file.path: file.read() for file in source.files}
    if method == "svd":
        for target, change in first.deltas.items():
            assert distance(effect(second.deltas[target]), effect(change)) < 1e-6


def test_what_the_first_lacks_is_named():
    bare = with_files(random_adapter(0), "bare")
    whole = with_files(random_adapter(1), "whole", **PLAIN)
    (note,) = (n for n in combine([bare, whole])[1].notes if n.startswith("whole: "))
    assert "has a tokenizer, but the first one has none; has a chat template, but" in note
    assert not [n for n in combine([whole, bare])[1].notes if "tokenizer" in n]


def test_the_same_tokenizer_is_not_spoken_of():
    adapters = [with_files(random_adapter(i), str(i), **PLAIN) for i in range(3)]
    assert not combine(adapters)[1].notes
