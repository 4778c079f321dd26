"""Checkpoints: whole or not at all, and never believed without their hashes."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file

from loraformat.errors import InputError, ResourceError
from loraformat.train.loop import saved_state
from loraformat.train.loop.saved_state import name_of, newest, prune, read, write

TENSORS = {
    "parameter:a": torch.arange(6, dtype=torch.float32).view(2, 3),
    "optimizer:step:a": torch.tensor(3.0),
    "optimizer:state1:a": torch.arange(5, dtype=torch.uint8),
    "extra:0:empty": torch.zeros(0, 4),
    "extra:0:moment": torch.full((2, 2), 0.5, dtype=torch.float64),
}
FACTS = {"cursor": {"epoch": 0, "batch": 4, "data": "x"}, "metrics": 117}


def save(directory, step, **options):
    write(directory / name_of(step), {**FACTS, "step": step}, TENSORS, **options)
    return directory / name_of(step)


def test_back_bit_for_bit(tmp_path):
    found = read(save(tmp_path, 7))
    assert found.step == 7
    assert {name: found.facts[name] for name in FACTS} == FACTS
    assert set(found.tensors) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert found.tensors[name].dtype == tensor.dtype
        assert torch.equal(found.tensors[name], tensor)
    assert set(found.part("optimizer:")) == {"step:a", "state1:a"}


def test_the_safetensors_library_opens_it(tmp_path):
    loaded = load_file(save(tmp_path, 7) / "state.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in TENSORS.items())


def test_the_newest_whole_one_is_taken(tmp_path):
    for step in (1, 9, 10):
        save(tmp_path, step)
    assert newest(tmp_path)[0].step == 10
    damaged = tmp_path / name_of(10) / "state.safetensors"
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    found, problems = newest(tmp_path)
    assert found.step == 9
    assert len(problems) == 1
    assert "was modified" in problems[0]
    assert newest(tmp_path / "nowhere") == (None, [])


@pytest.mark.parametrize("change", ["cut", "other", "not json", "missing", "later version"])
def test_a_damaged_record_is_refused(tmp_path, change):
    path = save(tmp_path, 3) / "checkpoint.json"
    facts = json.loads(path.read_bytes())
    if change == "cut":
        path.write_bytes(path.read_bytes()[:-9])
    elif change == "other":
        path.write_text(json.dumps({**facts, "metrics": 4}))
    elif change == "not json":
        path.write_text("[NaN]")
    elif change == "later version":
        path.write_text(json.dumps({**facts, "schema_version": 2}))
    else:
        path.unlink()
    with pytest.raises(InputError):
        read(path.parent)
    assert newest(tmp_path)[0] is None


def test_one_that_stands_there_is_replaced(tmp_path):
    save(tmp_path, 3)
    write(tmp_path / name_of(3), {"step": 3}, {"w": torch.ones(1)})
    assert list(read(tmp_path / name_of(3)).tensors) == ["w"]
    assert [path.name for path in tmp_path.iterdir()] == [name_of(3)]


def test_the_oldest_go(tmp_path):
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    (tmp_path / "notes").mkdir()
    prune(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", name_of(3), name_of(4)]


def test_a_full_disk_leaves_the_last_one(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saved_state, "write_all", full)
    with pytest.raises(ResourceError, match="disk is full"):
        save(tmp_path, 2)
    monkeypatch.undo()
    assert newest(tmp_path)[0].step == 1
    assert [path.name for path in tmp_path.iterdir()] == [name_of(1)]


def test_the_adapter_lies_inside(tmp_path):
    path = save(tmp_path, 5, save_adapter=lambda place: place.mkdir())
    assert (path / "adapter").is_dir()
    assert os.stat(path / "state.safetensors").st_mode & 0o777 == 0o666 & ~_umask()


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask
