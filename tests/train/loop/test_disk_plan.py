"""The disk plan: that it bounds what lies there when the most does."""

from dataclasses import replace

import pytest

from loraformat.train.loop import loop, saved_state
from loraformat.train.run.memory_plan import ModelDims, plan_disk
from loraformat.train.run.options import TrainOptions

SHAPE = ModelDims(2, 64, 256, 1000, 10**6, 10**5, trained=10**6, extra_bytes=10**5, small=10**4)


def plan(shape=SHAPE, ranks=1, **options):
    return plan_disk(shape, TrainOptions(eval=("held",), **options), ranks)


def test_what_it_counts():
    usual = plan()
    assert (usual.best, usual.states) == (0, 0)
    assert plan(keep=5).checkpoints == 2 * usual.checkpoints
    assert plan(best=True).best == 2 * (4 * 10**6 + 10**5 + 10**6)
    assert plan(ranks=3).checkpoints - usual.checkpoints == 3 * 2 * 10**5
    on_disk = plan(optimizer_states="disk")
    assert on_disk.states == 8 * 10**6 and on_disk.checkpoints == usual.checkpoints
    saved = usual.checkpoints - plan(optimizer="adamw-8bit").checkpoints
    assert saved == 3 * round((8 - 2.04) * (10**6 - 10**4))
    fixed = plan(replace(SHAPE, fixed=10**6))
    assert fixed.adapter - usual.adapter == 4 * 10**6
    assert fixed.checkpoints - usual.checkpoints == 3 * 4 * 10**6
    assert plan().to_json()["total"] == usual.total == usual.checkpoints + usual.adapter


def bytes_in(directory):
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


@pytest.mark.parametrize("init", ["kaiming", "pissa"])
def test_the_plan_bounds_what_is_written(train_to, tmp_path, place, monkeypatch, init):
    """Looked at when a new checkpoint stands beside those that are kept, and a new best one."""
    found = {"checkpoints": [], "best": []}
    prune, write = saved_state.prune, saved_state.write

    def pruned(directory, keep):
        found["checkpoints"].append(sum(map(bytes_in, directory.glob("step-*"))))
        prune(directory, keep)

    def written(target, *arguments, **options):
        before = bytes_in(target) if target.exists() else 0
        write(target, *arguments, **options)
        if target.name == "best":
            found["best"].append(before + bytes_in(target))

    monkeypatch.setattr(loop.saved_state, "prune", pruned)
    monkeypatch.setattr(loop.saved_state, "write", written)
    report = train_to(
        tmp_path / "a", rank=32, init=init, epochs=3, save_every=1, eval_every=1, best=True,
        eval=(str(place / "held.jsonl"),), keep=1,
    )  # fmt: skip
    disk = report.disk
    records = 1_000_000  # what headers and records are taken for, which are small here
    assert max(found["checkpoints"]) <= disk.checkpoints <= max(found["checkpoints"]) + 4 * records
    assert max(found["best"]) <= disk.best <= max(found["best"]) + 2 * records
    assert bytes_in(tmp_path / "a") <= disk.adapter <= bytes_in(tmp_path / "a") + records


def test_room_for_what_is_there_already_is_not_asked_for_again(train_to, tmp_path, monkeypatch):
    from collections import namedtuple

    from tests.train.loop.test_run import Killed, killer

    with pytest.raises(Killed):
        train_to(tmp_path / "a", save_every=2, observe=killer(4))
    there = bytes_in(tmp_path / "a.run" / "checkpoints")
    assert there > 0
    needed = train_to(tmp_path / "b", dry_run=True).disk.total - there
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(
        "loraformat.train.run.train.shutil.disk_usage", lambda path: usage(0, 0, needed)
    )
    train_to(tmp_path / "a", resume=True)
