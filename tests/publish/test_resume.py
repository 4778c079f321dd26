"""An interrupted conversion continues behind its finished shards, and ends in the same bytes."""

import json
import os
from pathlib import Path

import pytest

from loraformat.ops.convert.convert import convert
from loraformat.shards import writer

LIMIT = 6_000


@pytest.fixture(autouse=True)
def fast_disk(monkeypatch):
    """Nothing here is about power cuts."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(params=["safetensors", "loraformat"])
def to_format(request):
    return request.param


@pytest.fixture
def reference(model, tmp_path, to_format, snapshot):
    """The output of an uninterrupted run."""
    convert(model, tmp_path / "reference", to_format=to_format, max_shard_size=LIMIT)
    return snapshot(tmp_path / "reference")


def interrupt_after(model, target, to_format, tensors, **options):
    """Press Ctrl-C when so many tensors are written."""
    seen = []

    def progress(done, total):
        seen.append(done)
        if len(seen) == tensors:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(
            model, target, to_format=to_format, max_shard_size=LIMIT, progress=progress, **options
        )


@pytest.fixture
def written(monkeypatch):
    """Names of the shards that are really written from now on."""
    names = []
    write_shard = writer._write_shard

    def watched(tensors, name, publication, progress):
        names.append(name)
        return write_shard(tensors, name, publication, progress)

    monkeypatch.setattr(writer, "_write_shard", watched)
    return names


def shards_in(directory):
    return sorted(path.name for path in directory.glob("model-*.safetensors"))


@pytest.mark.parametrize("tensors", [4, 9, 15, 20])
def test_a_rerun_skips_finished_shards_and_gives_the_same_bytes(
    model, tmp_path, to_format, reference, snapshot, written, tensors
):
    target = tmp_path / "out"
    interrupt_after(model, target, to_format, tensors)
    assert not target.exists()
    finished = shards_in(tmp_path / "out.partial")
    written.clear()
    convert(model, target, to_format=to_format, max_shard_size=LIMIT)
    assert snapshot(target) == reference
    assert finished
    assert not set(finished) & set(written)
    assert sorted([*finished, *written]) == shards_in(target)
    assert not (tmp_path / "out.partial").exists()


def test_a_run_may_be_interrupted_many_times(model, tmp_path, to_format, reference, snapshot):
    target = tmp_path / "out"
    for tensors in (3, 5, 7, 9):
        interrupt_after(model, target, to_format, tensors)
    convert(model, target, to_format=to_format, max_shard_size=LIMIT)
    assert snapshot(target) == reference


def damage_last_byte(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def damage_first_weight(path):
    data = bytearray(path.read_bytes())
    data[4096] ^= 1
    path.write_bytes(data)


def damage_header(path):
    path.write_bytes(path.read_bytes().replace(b"model.", b"modex.", 1))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-10])


def empty(path):
    path.write_bytes(b"")


def turn_into_a_link(path):
    moved = path.parent.parent / "moved.safetensors"
    path.rename(moved)
    path.symlink_to(moved)


@pytest.mark.parametrize(
    "damage",
    [
        damage_last_byte,
        damage_first_weight,
        damage_header,
        truncate,
        empty,
        turn_into_a_link,
        Path.unlink,
    ],
)
def test_a_finished_shard_that_was_damaged_is_written_again(
    model, tmp_path, to_format, reference, snapshot, written, damage
):
    target = tmp_path / "out"
    interrupt_after(model, target, to_format, 12)
    victim, *others = shards_in(tmp_path / "out.partial")
    damage(tmp_path / "out.partial" / victim)
    written.clear()
    convert(model, target, to_format=to_format, max_shard_size=LIMIT)
    assert victim in written
    assert others
    assert not set(others) & set(written)
    assert snapshot(target) == reference
    assert not any(path.is_symlink() for path in target.iterdir())


@pytest.mark.parametrize(
    "key", ["bytes", "tensors", "stored", "tensor_bytes", "header_sha256", None]
)
def test_a_journal_that_says_nonsense_is_not_believed(
    model, tmp_path, to_format, reference, snapshot, key
):
    interrupt_after(model, tmp_path / "out", to_format, 12)
    path = tmp_path / "out.partial" / ".loraformat-journal.json"
    journal = json.loads(path.read_text())
    for name, facts in journal["done"].items():
        if key is None:
            journal["done"][name] = 7
        else:
            facts[key] = None
    path.write_text(json.dumps(journal))
    convert(model, tmp_path / "out", to_format=to_format, max_shard_size=LIMIT)
    assert snapshot(tmp_path / "out") == reference


def test_other_options_do_not_continue(model, tmp_path, snapshot, written):
    convert(
        model, tmp_path / "reference", to_format="safetensors", dtype="bf16", max_shard_size=LIMIT
    )
    interrupt_after(model, tmp_path / "out", "safetensors", 12)
    written.clear()
    convert(model, tmp_path / "out", to_format="safetensors", dtype="bf16", max_shard_size=LIMIT)
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "reference")
    assert written == shards_in(tmp_path / "out")


def test_another_input_does_not_continue(model, tmp_path, snapshot, written):
    interrupt_after(model, tmp_path / "out", "safetensors", 12)
    weights = model / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    written.clear()
    convert(model, tmp_path / "out", to_format="safetensors", max_shard_size=LIMIT)
    convert(model, tmp_path / "reference", to_format="safetensors", max_shard_size=LIMIT)
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "reference")
    assert written[: len(written) // 2] == shards_in(tmp_path / "out")


def test_a_replacement_that_is_interrupted_leaves_the_old_output(model, tmp_path, snapshot):
    target = tmp_path / "out"
    convert(model, target, to_format="safetensors")
    old = snapshot(target)
    interrupt_after(model, target, "safetensors", 12, force=True)
    assert snapshot(target) == old
    convert(model, target, to_format="safetensors", max_shard_size=LIMIT, force=True)
    assert len(shards_in(target)) > 1
