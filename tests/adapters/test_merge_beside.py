"""Merging into a bundle: the codes stay, the sum of the adapters lies beside them."""

import os

import pytest
import torch
from transformers import AutoModelForCausalLM

from loraformat.bundle.integrity import verify_bundle
from loraformat.errors import FileChangedError, InputError, UnsupportedError, UsageError
from loraformat.ops.convert.convert import convert
from loraformat.ops.merge.merge import merge
from tests.adapters.bundles import logits, manifest, name_base, save_adapter


@pytest.fixture
def second(work):
    """Another adapter of the base, of another rank and scaling."""
    model = AutoModelForCausalLM.from_pretrained(work.base)
    path = work.path / "second"
    save_adapter(model, path, seed=5, r=3, lora_alpha=6, use_rslora=True,
                 target_modules=["q_proj", "down_proj"])  # fmt: skip
    return path


def beside(work, adapters, target, **options):
    return merge(work.bundle, adapters, target, to="loraformat", **options)


def test_one_adapter_is_copied_beside_the_codes(work, snapshot, tmp_path):
    target = tmp_path / "out"
    before = snapshot(work.bundle)
    report = beside(work, [work.adapter], target)
    assert (report.beside, report.total, report.warnings) == ("adapter", None, [])
    assert verify_bundle(target) == []
    assert snapshot(work.bundle) == before
    after = snapshot(target)
    shards = [name for name in before if name.endswith(".safetensors")]
    assert shards and all(after[name] == before[name] for name in shards)
    assert all(
        after[f"adapters/adapter/{name}"] == digest
        for name, digest in snapshot(work.adapter).items()
    )
    assert manifest(target)["fingerprint"] == manifest(work.bundle)["fingerprint"]


@pytest.mark.parametrize("form", ["loraformat", "bitsandbytes"])
def test_a_weighted_sum_is_one_adapter(work, second, tmp_path, form):
    source = work.bundle
    if form == "bitsandbytes":
        source = tmp_path / "bnb"
        convert(work.bundle, source, to_format=form)
    weights = [0.7, -1.5]
    report = merge(source, [work.adapter, second], tmp_path / "out", to="loraformat",
                   weight=weights, name="both")  # fmt: skip
    assert report.beside == "both"
    assert verify_bundle(tmp_path / "out") == []
    assert list(manifest(tmp_path / "out")["adapters"]) == ["both"]
    merge(work.bundle, [work.adapter, second], tmp_path / "dense", weight=weights, dtype="f32")
    convert(work.bundle, tmp_path / "plain", to_format="safetensors", dtype="f32")
    wanted = logits(tmp_path / "dense")
    found = logits(tmp_path / "plain", tmp_path / "out" / "adapters" / "both")
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)
    assert (wanted - logits(tmp_path / "plain")).abs().max() > 1e-2


def test_names_and_what_does_not_go_together(work, second, tmp_path):
    target = tmp_path / "out"
    assert beside(work, [work.adapter, second], target, dry_run=True).beside == "merged"
    assert not target.exists()
    for options in ({"dtype": "f16"}, {"undo": tmp_path / "undo"}, {"name": "../x"}):
        with pytest.raises(UsageError):
            beside(work, [work.adapter], target, **options)
    with pytest.raises(UsageError, match="--to loraformat"):
        merge(work.bundle, [work.adapter], target, name="x")
    with pytest.raises(UsageError, match="convert it to a bundle first"):
        merge(work.base, [work.adapter], target, to="loraformat")
    name_base(second, "0" * 64)
    for adapters in ([second], [work.adapter, second]):
        with pytest.raises(InputError, match="allow-base-mismatch"):
            beside(work, adapters, target)
    assert not target.exists() and not (tmp_path / "out.partial").exists()
    beside(work, [second], target, allow_base_mismatch=True)
    assert verify_bundle(target) == []


def test_what_has_no_sum_is_refused_and_leaves_nothing(work, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(work.base)
    save_adapter(model, tmp_path / "dora", use_dora=True)
    with pytest.raises(UnsupportedError, match="DoRA"):
        beside(work, [tmp_path / "dora"], tmp_path / "out", weight=[0.5])
    assert sorted(path.name for path in tmp_path.iterdir() if "out" in path.name) == []
    beside(work, [tmp_path / "dora"], tmp_path / "out")
    assert verify_bundle(tmp_path / "out") == []


def test_an_adapter_that_changes_during_a_merge_is_noticed(work, tmp_path, monkeypatch):
    """The change is found before anything is published, dense or beside the codes."""
    monkeypatch.setenv("LORAFORMAT_IO", "pread")
    weights = work.adapter / "adapter_model.safetensors"
    for to_format in ("safetensors", "loraformat"):
        with pytest.raises(FileChangedError, match=r"adapter_model\.safetensors"):
            merge(
                work.bundle, [work.adapter], tmp_path / "out", to=to_format,
                progress=lambda done, total: os.utime(weights, ns=(1, 1)),
            )  # fmt: skip
        assert not list(tmp_path.glob("out*"))
        os.utime(weights)
