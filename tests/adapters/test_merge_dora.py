"""Several adapters in one merge, DoRA among them: one after the other, as PEFT computes them."""

import itertools

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from loraformat.ops.merge.merge import merge
from loraformat.ops.unmerge.unmerge import unmerge
from tests.adapters import merging, peft_models
from tests.adapters.peft_models import logits
from tests.torch_tensors import numbers

KINDS = {
    "dora": {"use_dora": True, "lora_alpha": 10},
    "dora too": {"use_dora": True, "lora_alpha": 6},
    "plain": {"lora_alpha": 6},
}
MODELS = {
    "llama": (peft_models.llama, ["q_proj", "down_proj"]),
    "gpt2": (peft_models.gpt2, ["c_fc"]),
}


@pytest.fixture(scope="module", params=MODELS)
def made(request, tmp_path_factory):
    """A base, and an adapter of each kind."""
    build, targets = MODELS[request.param]
    folder = tmp_path_factory.mktemp("dora")
    torch.manual_seed(0)
    build().save_pretrained(folder / "base")
    for number, (name, options) in enumerate(KINDS.items()):
        base = AutoModelForCausalLM.from_pretrained(folder / "base")
        wrapped = get_peft_model(base, LoraConfig(r=4, target_modules=targets, **options))
        torch.manual_seed(number)
        with torch.no_grad():
            for parameter in wrapped.parameters():
                if parameter.requires_grad:
                    parameter += 0.1 * torch.randn_like(parameter)
        wrapped.save_pretrained(folder / name)
    return folder


def by_peft(folder, names):
    """Logits with all of these adapters at work, and after PEFT's merge of them."""
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    model = PeftModel.from_pretrained(base, folder / names[0], adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(folder / name, name)
    model.base_model.set_adapter(list(names))
    with torch.no_grad():
        found = model.eval()(peft_models.IDS).logits
        return found, model.merge_and_unload()(peft_models.IDS).logits


@pytest.mark.parametrize("names", [*itertools.permutations(KINDS, 2), tuple(KINDS)])
def test_as_peft_computes(made, tmp_path, names):
    running, merged = by_peft(made, names)
    report = merge(made / "base", [made / name for name in names], tmp_path / "out")
    found, without = logits(tmp_path / "out"), logits(made / "base")
    for wanted in (running, merged):
        assert (found - wanted).norm() < 1e-5 * (wanted - without).norm()
    assert any("so the order matters" in note for note in report.notes)


def test_the_order_is_no_matter_of_rounding(made, tmp_path):
    names = ["dora", "dora too"]
    one, other = by_peft(made, names)[1], by_peft(made, names[::-1])[1]
    assert (one - other).norm() > 0.1 * (one - logits(made / "base")).norm()


def test_alone_nothing_is_said(made, tmp_path):
    report = merge(made / "base", [made / "dora"], tmp_path / "out")
    assert not any("order" in note for note in report.notes)


def test_undone_bit_by_bit(made, tmp_path):
    record = tmp_path / "merge.lfu"
    merge(made / "base", [made / "dora", made / "plain"], tmp_path / "out", undo=record)
    assert unmerge(tmp_path / "out", tmp_path / "again", undo=record).exact
    before, after = (merging.weights_of(path) for path in (made / "base", tmp_path / "again"))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_weights_and_a_row_that_one_makes_zero(tmp_path):
    """Against the formula, by hand: a magnitude of zero leaves what comes after it."""
    base, tensors = merging.small(tmp_path)
    weight = tensors[merging.Q].double()
    magnitudes = [torch.linspace(0, 2, 32), torch.linspace(1, 3, 32)]
    deltas = [
        merging.delta(merging.Q, 32, 32, seed=seed, magnitude=merging.dense("m", magnitude))
        for seed, magnitude in zip((1, 5), magnitudes, strict=True)
    ]
    users = [1.0, 0.5]
    merge(base, [merging.adapter(d) for d in deltas], tmp_path / "out", weight=users, dtype="f32")
    wanted = weight
    for delta, magnitude, user in zip(deltas, magnitudes, users, strict=True):
        change = 2.0 * numbers(delta.b).double() @ numbers(delta.a).double()
        gain = (magnitude.double() / (weight + change).norm(dim=1))[:, None]
        wanted = wanted + user * (gain * (wanted + change) - wanted)
    found = merging.weights_of(tmp_path / "out")[merging.Q].double()
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)
