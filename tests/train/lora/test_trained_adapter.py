"""What is written: PEFT's files, the base's fingerprint, statistics, the record; and read again."""

import json
from dataclasses import replace

import pytest
import torch
from dense_sites import sites_of
from tiny_bases import load_dense, tokens

from loraformat.bundle.reader import open_bundle
from loraformat.errors import InputError, LoraFormatError, OutputError, UnsupportedError
from loraformat.model.adapter import STATISTICS_NAME, RowReplacement
from loraformat.ops.convert.convert import convert
from loraformat.ops.opening.adapter import open_adapter
from loraformat.ops.verify import verify
from loraformat.runtimes.chat import RECORD_NAME
from loraformat.testing.models import dense
from loraformat.train import LoraOptions
from loraformat.train.lora.branches import attach, attach_adapter, trainable
from loraformat.train.lora.trained_adapter import save_adapter, trained_adapter
from tests.torch_tensors import numbers


def trained(paths, **options):
    """A dense model with branches that one backward pass went through, and its options."""
    options = LoraOptions(**{"rank": 4, "init": "orthogonal", **options})
    model = load_dense(paths.dense).requires_grad_(False).train()
    branches = attach(sites_of(model), options)
    with torch.no_grad():
        for branch in branches.values():
            branch.b.add_(0.05)
            if branch.target.kind == "embedding":
                branch.a.add_(0.05)
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    return model, branches, options


def config_of(path):
    return json.loads((path / "adapter_config.json").read_text())


@pytest.fixture
def shelf(base, tmp_path):
    """A bundle that adapters may be put into."""
    convert(base("llama").original, tmp_path / "bundle")
    return tmp_path / "bundle"


def test_config_says_what_was_trained(base, tmp_path):
    _, branches, options = trained(
        base("llama"), alpha=8, dropout=0.1, targets=("q_proj", "down_proj")
    )
    with open_bundle(base("llama").bundle) as bundle:
        path = save_adapter(branches, bundle, tmp_path / "a", options=options)
        fingerprint = bundle.manifest.fingerprint
    config = config_of(path)
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 8, 0.1)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["task_type"] == "CAUSAL_LM" and config["use_dora"] is False
    assert sorted(config["target_modules"]) == sorted(branches)
    assert config["base_model_name_or_path"]
    with open_adapter(path) as adapter:
        assert adapter.base_fingerprint == fingerprint
        assert json.loads(adapter.base_source) == dict(bundle.manifest.source)
        delta = adapter.deltas["model.layers.0.self_attn.q_proj.weight"]
        assert delta.scaling == 2.0
        branch = branches["model.layers.0.self_attn.q_proj"]
        assert torch.equal(numbers(delta.b), branch.b)  # B as it was trained
        assert torch.equal(numbers(delta.second_moment), branch.moments.second_moment())


def test_experts_are_saved_without_the_dropout_that_peft_refuses(base, tmp_path):
    _, branches, options = trained(base("mixtral"), dropout=0.1)
    with open_bundle(base("mixtral").bundle) as bundle:
        save_adapter(branches, bundle, tmp_path / "a", options=options)
    config = config_of(tmp_path / "a")
    assert config["lora_dropout"] == 0.0 and len(config["target_parameters"]) == 4


def test_the_record_holds_options_base_and_facts(base, tmp_path):
    _, branches, options = trained(base("llama"), seed=3, ranks={"q_proj": 2})
    facts = {"steps": 20, "loss": [2.0, 1.5]}
    with open_bundle(base("llama").bundle) as bundle:
        save_adapter(branches, bundle, tmp_path / "a", options=options, facts=facts)
        record = json.loads((tmp_path / "a" / RECORD_NAME).read_text())
        assert record["base"]["fingerprint"] == bundle.manifest.fingerprint
        assert record["training"] == facts
        assert record["trained_parameters"] == sum(
            parameter.numel() for parameter in trainable(branches).values()
        )
        assert record["lora"]["seed"] == 3 and record["lora"]["ranks"] == {"q_proj": 2}
        for wrong in ({"loss": float("nan")}, {"model": object()}):
            with pytest.raises(LoraFormatError, match="no JSON"):
                save_adapter(branches, bundle, tmp_path / "b", facts=wrong)
    assert not (tmp_path / "b").exists()


def test_an_existing_output_is_replaced_only_by_force(base, tmp_path):
    _, branches, _ = trained(base("llama"), targets=("q_proj",))
    with open_bundle(base("llama").bundle) as bundle:
        save_adapter(branches, bundle, tmp_path / "a")
        before = (tmp_path / "a" / "adapter_model.safetensors").read_bytes()
        branches["model.layers.0.self_attn.q_proj"].a.data += 1
        with pytest.raises(OutputError):
            save_adapter(branches, bundle, tmp_path / "a")
        assert (tmp_path / "a" / "adapter_model.safetensors").read_bytes() == before
        save_adapter(branches, bundle, tmp_path / "a", force=True)
    assert (tmp_path / "a" / "adapter_model.safetensors").read_bytes() != before


@pytest.mark.parametrize("inside", [False, True])
def test_a_diverged_factor_leaves_nothing_behind(base, shelf, tmp_path, inside):
    _, branches, _ = trained(base("llama"), targets=("q_proj",))
    branches["model.layers.1.self_attn.q_proj"].b.data[0, 0] = float("nan")
    target = shelf / "adapters" / "mine" if inside else tmp_path / "a"
    with open_bundle(shelf) as bundle, pytest.raises(LoraFormatError, match="diverged"):
        save_adapter(branches, bundle, target)
    assert not target.exists()
    assert not verify(shelf).findings


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {"dora": True, "embeddings": True, "head": True, "alpha": 8}),
        ("llama-tied", {"head": True}),
        ("llama", {"rslora": True, "ranks": {"q_proj": 2}}),
        ("gpt2", {"init": "pissa"}),
        ("mixtral", {}),
    ],
)
def test_it_goes_into_the_bundle_and_trains_on_from_there(name, options, base, tmp_path):
    convert(base(name).original, tmp_path / "bundle")
    model, branches, lora = trained(base(name), **options)
    target = tmp_path / "bundle" / "adapters" / "mine"
    with open_bundle(tmp_path / "bundle") as bundle:
        save_adapter(branches, bundle, target, options=lora)
    assert not verify(tmp_path / "bundle").findings
    assert (target / STATISTICS_NAME).is_file() and (target / RECORD_NAME).is_file()
    again = load_dense(base(name).dense)
    with (
        open_bundle(tmp_path / "bundle") as bundle,
        open_adapter(target, base=bundle.checkpoint) as adapter,
    ):
        found = attach_adapter(sites_of(again), adapter, LoraOptions(dropout=0.25))
    assert list(found) == list(branches)
    assert all(branch.dropout == 0.25 for branch in found.values() if not branch.target.experts)
    for branch in (*branches.values(), *found.values()):
        branch.eval()
    wanted = model.eval()(input_ids=tokens()).logits
    logits = again(input_ids=tokens()).logits
    assert (logits - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def wrong_adapters():
    vector = dense("v", torch.ones(32))
    q = "model.layers.0.self_attn.q_proj.weight"

    def biased(adapter):
        adapter.deltas[q] = replace(adapter.deltas[q], bias=vector)

    def unknown(adapter):
        adapter.deltas["model.layers.9.self_attn.q_proj.weight"] = adapter.deltas.pop(q)

    def misshapen(adapter):
        adapter.deltas[q] = replace(adapter.deltas[q], a=dense("a", torch.ones(4, 33)))

    return {
        "biases": (biased, "biases of its own"),
        "replacement": (lambda a: a.replacements.update({"model.norm.weight": vector}), "a whole"),
        "experts": (
            lambda a: a.deltas.update(
                x=replace(a.deltas[q], a=dense("a", torch.ones(2, 4, 32)), magnitude=vector)
            ),
            "magnitudes of fused experts",
        ),
        "rows": (lambda a: a.rows.update(x=RowReplacement("x", (0,), vector)), "replaces rows"),
        "alora": (lambda a: setattr(a, "invocation_tokens", (5,)), "some tokens only"),
        "unknown": (unknown, r"layers\.9.*nearest is model\.layers\.\d"),
        "shapes": (misshapen, r"A \[4, 33\].*wanted \[4, 32\]"),
    }


@pytest.mark.parametrize("case", wrong_adapters())
def test_what_is_more_than_deltas_of_this_model_is_refused(case, base):
    change, problem = wrong_adapters()[case]
    _, branches, _ = trained(base("llama"), targets=("q_proj",))
    model = load_dense(base("llama").dense)
    with open_bundle(base("llama").bundle) as bundle:
        adapter = trained_adapter(branches, bundle)
        change(adapter)
        with pytest.raises((InputError, UnsupportedError), match=problem):
            attach_adapter(sites_of(model), adapter)
