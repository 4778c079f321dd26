"""Adapters in bundles: added, listed, replaced, removed; the base stays as it is."""

import torch

from loraformat.integrity import verify_bundle
from loraformat.ops.adapters import open_adapter
from loraformat.ops.bundle_adapters import Incoming, add_adapters, write_bundle
from loraformat.plugins import WriteOptions
from loraformat.publish import Publication
from loraformat.reader import open_bundle
from tests.adapters.bundles import logits, manifest


def add(work, name="medical", *, force=False, **options):
    with (
        open_bundle(work.bundle) as bundle,
        open_adapter(work.adapter, base=bundle.checkpoint) as adapter,
    ):
        return add_adapters(work.bundle, {name: Incoming(adapter, **options)}, force=force)


def test_every_file_is_copied_and_listed(work, snapshot):
    base, files = snapshot(work.bundle), snapshot(work.adapter)
    notes = add(work)
    assert notes == [
        "adapter medical: it names no base by fingerprint: only names and shapes were compared"
    ]
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


def test_a_new_bundle_may_have_adapters(work, tmp_path):
    with (
        open_bundle(work.bundle) as bundle,
        open_adapter(work.adapter, base=bundle.checkpoint) as adapter,
        Publication(tmp_path / "new", plan="p") as output,
    ):
        incoming = {"as-is": Incoming(adapter), "as-is.partial": Incoming(adapter, canonical=True)}
        written = write_bundle(
            bundle.checkpoint, output, WriteOptions(1 << 30, lambda nbytes: None), incoming
        )
        output.commit()
    assert verify_bundle(tmp_path / "new") == []
    assert list(manifest(tmp_path / "new")["adapters"]) == ["as-is", "as-is.partial"]
    assert [note.split(":")[0] for note in written.notes] == [
        "adapter as-is", "adapter as-is.partial",
    ]  # fmt: skip
    with open_adapter(tmp_path / "new" / "adapters" / "as-is.partial") as adapter:
        assert adapter.base_fingerprint == manifest(work.bundle)["fingerprint"]
        assert adapter.base_source == '{"format": "loraformat"}'
