"""Branches on the mapped shards of a bundle: trained, saved, opened by PEFT, trained on."""

import json
import re
from functools import partial

import peft
import pytest
import torch
import transformers
from tiny_bases import load_dense, tokens

from loraformat.bundle.reader import open_bundle
from loraformat.errors import InputError, UsageError
from loraformat.ops.convert.convert import convert
from loraformat.ops.reduce import reduce
from loraformat.ops.verify import verify
from loraformat.train import Batch, LoraOptions, load
from loraformat.train.loop.optimizer import parameter_groups
from tests.torch_tensors import numbers


def batch_of(rows, padded=0):
    """Rows as a batch, the first one followed by some padding."""
    segments = torch.ones_like(rows)
    segments[0, rows.shape[1] - padded :] = 0
    labels = torch.where(segments > 0, rows, -100)
    labels[:, 0] = -100
    positions = torch.arange(rows.shape[1]).expand_as(rows).contiguous()
    return Batch(rows, labels, positions, segments, tuple((n,) for n in range(len(rows))))


def train(model, batch, steps=3, lr=5e-3):
    model.train()
    optimizer = torch.optim.AdamW(parameter_groups(model.trainable(), lr, ratio=4.0))
    losses = []
    for _ in range(steps):
        loss = model.loss(batch)
        losses.append(loss.item())
        optimizer.zero_grad()
        (loss / batch.trained).backward()
        optimizer.step()
    model.eval()
    return losses


CASES = {
    "plain": ("llama", {"alpha": 8}),
    "everything": ("llama", {"embeddings": True, "head": True, "dora": True}),
    "tied": ("llama-tied", {"embeddings": True, "head": True, "alpha": 8}),
    "scaled": ("gemma3", {"embeddings": True, "rslora": True, "ranks": {"q_proj": 2}}),
    "conv1d": ("gpt2", {"dora": True}),
    "experts": ("mixtral", {"alpha": 8}),
    "pissa": ("llama", {"init": "pissa", "alpha": 2}),
    "pissa-experts": ("mixtral", {"init": "pissa"}),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_trained_is_what_peft_computes(case, base, tmp_path):
    name, options = CASES[case]
    options = LoraOptions(**{"rank": 4, **options})
    with load(base(name).bundle, lora=options) as model:
        plain = load_dense(base(name).dense)(input_ids=tokens()).logits
        model.eval()
        before = model(input_ids=tokens()).logits
        assert (before - plain).abs().max() <= 2e-5 * plain.abs().max()  # it begins as the base
        losses = train(model, batch_of(tokens()))
        assert losses[-1] < losses[0]
        logits = model(input_ids=tokens()).logits
        assert (logits - before).abs().max() > 0.05
        model.save_adapter(tmp_path / "a", facts={"losses": losses})
    theirs = peft.PeftModel.from_pretrained(load_dense(base(name).dense), tmp_path / "a").eval()
    wanted = theirs(input_ids=tokens()).logits
    assert (logits - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    # ... and what is computed again from what was saved
    with load(base(name).bundle, adapter=tmp_path / "a") as again:
        again.eval()
        found = again(input_ids=tokens()).logits
        assert (found - logits).abs().max() <= 1e-5 * logits.abs().max()


def test_peft_on_the_bundle_in_bitsandbytes_computes_the_same(base, tmp_path):
    with load(base("llama-wide").bundle, lora=LoraOptions(rank=4, alpha=8, dora=True)) as model:
        train(model, batch_of(tokens()))
        logits = model(input_ids=tokens()).logits
        model.save_adapter(tmp_path / "a")
    four_bit = transformers.AutoModelForCausalLM.from_pretrained(
        base("llama-wide").bundle, dtype=torch.float32, attn_implementation="eager"
    )
    theirs = peft.PeftModel.from_pretrained(four_bit, tmp_path / "a")
    for module in theirs.modules():  # else it repacks its weights, and rounds them
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    with torch.no_grad():
        wanted = theirs.train()(input_ids=tokens()).logits
    assert (logits - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_moments_are_those_of_the_positions_that_the_loss_depends_on(base):
    options = LoraOptions(rank=4, init="orthogonal", targets=("mlp", "q_proj"), head=True)
    rows = tokens()
    seen = {}
    with load(base("llama").bundle, lora=options) as model:
        model.train()

        def look(name, module, inputs):
            seen.setdefault(name, inputs[0].detach())

        hooks = [
            model.base.get_submodule(name).register_forward_pre_hook(partial(look, name))
            for name in model.branches
        ]
        model.loss(batch_of(rows, padded=5)).backward()
        for hook in hooks:
            hook.remove()
        for name, branch in model.branches.items():
            # A padded row of 12 tokens teaches 6 predictions, the other one 11. Nothing depends on
            # a first token's query, which has one key.
            first = 1 if name.endswith("q_proj") else 0
            counted = int(branch.moments.count)
            assert counted == 6 + 11 - 2 * first, name
            x = seen[name]  # the head sees no others
            x = torch.cat([x[0, first:6], x[1, first:11]]) if len(x) == 2 else x[0]
            z = x @ branch.a.T
            wanted = z.T @ z / counted
            found = branch.moments.second_moment()
            assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max(), name


def test_moments_do_not_depend_on_how_many_rows_go_through_a_layer_at_once(base):
    found = []
    for rows_at_once in (None, 1):
        with load(base("mixtral").bundle, lora=LoraOptions(rank=4)) as model:
            model.train().loss(batch_of(tokens()), rows_at_once=rows_at_once).backward()
            found.append([branch.moments.second_moment() for branch in model.branches.values()])
    for one, other in zip(*found, strict=True):
        # the first row fades by the tokens of the second
        assert (one - other).abs().max() <= 1e-3 * one.abs().max()


def test_statistics_go_over_a_restart(base):
    options = LoraOptions(rank=4)
    with load(base("llama").bundle, lora=options) as model:
        train(model, batch_of(tokens()))
        state = {name: value.clone() for name, value in model.extra_state().items()}
        with load(base("llama").bundle, lora=options) as again:
            again.load_extra_state(state)
            assert all(map(torch.equal, again.extra_state().values(), state.values()))


def test_it_goes_into_its_own_bundle_and_is_reduced_by_its_statistics(base, tmp_path):
    convert(base("mixtral").original, tmp_path / "bundle")
    target = tmp_path / "bundle" / "adapters" / "mine"
    with load(tmp_path / "bundle", lora=LoraOptions(rank=4)) as model:
        train(model, batch_of(tokens()))
        model.save_adapter(target, facts={"steps": 3})
    assert not verify(tmp_path / "bundle").findings
    assert json.loads((target / "training_record.json").read_text())["training"] == {"steps": 3}
    report = reduce(target, tmp_path / "smaller", rank=2)
    assert all(module.activation_aware and module.new_rank == 2 for module in report.modules)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_loftq_begins_nearer_to_the_original(name, base):
    paths = base(name)
    wanted = load_dense(paths.original)(input_ids=tokens()).logits
    errors = []
    for init in ("kaiming", "loftq"):
        options = LoraOptions(rank=8, init=init)
        with load(paths.bundle, lora=options, original=paths.original) as model:
            errors.append(float((model.eval()(input_ids=tokens()).logits - wanted).norm()))
    assert errors[1] < 0.9 * errors[0]
    with pytest.raises(UsageError, match="needs the model that was quantized"):
        load(paths.bundle, lora=LoraOptions(init="loftq"))


def test_an_adapter_trains_on_from_where_it_was(base, tmp_path):
    with load(base("llama").bundle, lora=LoraOptions(rank=4, alpha=8)) as model:
        first = train(model, batch_of(tokens()))
        model.save_adapter(tmp_path / "a")
    with load(base("llama").bundle, adapter=tmp_path / "a", lora=LoraOptions(rank=9)) as model:
        second = train(model, batch_of(tokens()), steps=2)
        model.save_adapter(tmp_path / "b")
    record = json.loads((tmp_path / "b" / "training_record.json").read_text())
    assert record["lora"] is None  # those options did not make it
    assert second[1] < second[0] < first[-1]


def test_an_adapter_of_another_base_is_trained_on_if_that_is_allowed(base, tmp_path):
    with load(base("llama").bundle, lora=LoraOptions(rank=4)) as model:
        model.save_adapter(tmp_path / "a")
    convert(base("llama").original, tmp_path / "other", block_size=128)
    problem = "was made for the base .*, and this one is "
    with pytest.raises(InputError, match=f"{problem}.* override with --allow-base-mismatch"):
        load(tmp_path / "other", adapter=tmp_path / "a")
    with load(tmp_path / "other", adapter=tmp_path / "a", allow_base_mismatch=True) as model:
        (note,) = model.notes
        assert re.search(f"{problem}.*; it may not work on this base$", note)
        train(model, batch_of(tokens()))
        model.save_adapter(tmp_path / "b")
    with load(tmp_path / "other", adapter=tmp_path / "b") as model:  # it is this base's now
        assert model.notes == []


def test_targets_that_mean_nothing_are_named(base):
    with pytest.raises(UsageError, match=r"nearest is q_proj"):
        load(base("llama").bundle, lora=LoraOptions(targets=("q_prj",)))


def test_adapter_shows_what_is_trained_at_the_moment(base):
    with load(base("llama").bundle, lora=LoraOptions(rank=4)) as model:
        adapter = model.adapter()
        with open_bundle(base("llama").bundle) as bundle:
            assert adapter.base_fingerprint == bundle.manifest.fingerprint
        delta = adapter.deltas["model.layers.0.self_attn.q_proj.weight"]
        assert not numbers(delta.b).any()
        train(model, batch_of(tokens()), steps=1)
        assert numbers(delta.b).any()
