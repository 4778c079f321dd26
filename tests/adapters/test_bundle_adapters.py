"""Adapters in bundles: added, listed, replaced, removed; the base stays as it is."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from loraformat.bundle.integrity import verify_bundle
from loraformat.bundle.reader import open_bundle
from loraformat.ops.adapter_output.output import write_bundle
from loraformat.ops.convert.convert import convert
from loraformat.ops.opening.adapter import open_adapter
from loraformat.plugins import WriteOptions
from loraformat.storage.atomic_output import AtomicOutput
from tests.adapters.bundles import logits, manifest


def add(work, name="medical", *, force=False, **options):
    return convert(work.adapter, work.bundle / "adapters" / name, force=force, **options).notes


def test_every_file_is_copied_and_listed(work, snapshot):
    base, files = snapshot(work.bundle), snapshot(work.adapter)
    notes = add(work)
    assert notes == ["records no base fingerprint; only names and shapes were compared"]
    after = snapshot(work.bundle)
    assert {name: after[f"adapters/medical/{name}"] for name in files} == files
    changed = {name for name in after if after[name] != base.get(name)}
    assert changed == {"loraformat.json", *(f"adapters/medical/{name}" for name in files)}
    listed = manifest(work.bundle)["adapters"]["medical"]["files"]
    assert {name: record["sha256"] for name, record in listed.items()} == files
    assert verify_bundle(work.bundle) == []


def test_peft_computes_the_same_from_the_bundle(work):
    wanted = logits(work.bundle, work.adapter)
    add(work)
    add(work, "canonical", canonical=True)
    assert torch.equal(logits(work.bundle, work.bundle / "adapters" / "medical"), wanted)
    found = logits(work.bundle, work.bundle / "adapters" / "canonical")
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    assert (wanted - logits(work.bundle)).abs().max() > 1e-2


FOREIGN = {
    "no prefix": ("base_model.model.", ""),
    "compiled": ("base_model.", "_orig_mod.base_model."),
    "text of a wrapped model": ("model.layers.", "model.language_model.layers."),
    "doubled": ("model.layers.", "model.model.layers."),
}


@pytest.mark.parametrize("spelling", FOREIGN)
def test_names_that_peft_ignores_are_put_right(work, tmp_path, spelling):
    """A copy, byte for byte, would be loaded without effect: and no bit of a factor changes."""
    wanted, before = logits(work.bundle, work.adapter), logits(work.bundle)
    weights = work.adapter / "adapter_model.safetensors"
    usual = load_file(weights)
    save_file({name.replace(*FOREIGN[spelling]): t for name, t in usual.items()}, weights)
    assert torch.equal(logits(work.bundle, work.adapter), before)
    report = convert(work.adapter, work.bundle / "adapters" / "medical")
    assert not report.verbatim
    assert any("converted, not copied: " in note and "PEFT" in note for note in report.notes)
    inside = work.bundle / "adapters" / "medical"
    assert torch.equal(logits(work.bundle, inside), wanted)
    written = load_file(inside / "adapter_model.safetensors")
    assert written.keys() == usual.keys()
    assert all(torch.equal(written[name], usual[name]) for name in usual)
    assert verify_bundle(work.bundle) == []


def test_a_new_bundle_may_have_adapters(work, tmp_path):
    with (
        open_bundle(work.bundle) as bundle,
        open_adapter(work.adapter, base=bundle.checkpoint) as adapter,
        AtomicOutput(tmp_path / "new", plan="p") as output,
    ):
        incoming = {
            "as-is": adapter,
            "as-is.partial": replace(adapter, verbatim=False),
        }
        written = write_bundle(
            bundle.checkpoint, output, WriteOptions(1 << 30, lambda nbytes: None), incoming
        )
        output.commit()
    assert verify_bundle(tmp_path / "new") == []
    assert list(manifest(tmp_path / "new")["adapters"]) == ["as-is", "as-is.partial"]
    assert [note.split("; only ")[0] for note in written.notes] == [
        "adapter as-is: records no base fingerprint",
        "adapter as-is.partial: records no base fingerprint",
        "adapter as-is.partial: converted, not copied: it was a pickle, was sharded, was "
        "modified, or had names that PEFT does not recognise",
    ]
    with open_adapter(tmp_path / "new" / "adapters" / "as-is.partial") as adapter:
        assert adapter.base_fingerprint == manifest(work.bundle)["fingerprint"]
        assert adapter.base_source == '{"format": "loraformat"}'
