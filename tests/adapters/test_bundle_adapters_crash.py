"""Kills and failures at every step, and several writers: the bundle stays valid."""

import errno
import itertools
import os
import shutil
import signal
import traceback

import pytest

from loraformat.bundle.integrity import verify_bundle
from loraformat.errors import InputError, LoraFormatError, OutputError
from loraformat.ops.convert.convert import convert
from loraformat.ops.remove import remove
from loraformat.storage.durable import locked
from tests.adapters.bundles import manifest
from tools.crash import steps


def in_child(action):
    """Run in a fork and return its wait status."""
    process = os.fork()
    if process:
        return os.waitpid(process, 0)[1]
    try:
        action()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


@pytest.mark.parametrize("replace", [False, True], ids=["new", "replace"])
def test_a_kill_before_every_step(work, snapshot, monkeypatch, replace):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # a kill does not need it
    target = work.bundle / "adapters" / "medical"
    convert(work.adapter, work.bundle / "adapters" / "other")
    if replace:
        convert(work.adapter, target)
        (work.adapter / "README.md").write_text("the second version")
    start = work.path / "start"
    shutil.copytree(work.bundle, start)
    old, new = snapshot(target), snapshot(work.adapter)
    base = {name: digest for name, digest in snapshot(start).items() if "/" not in name}
    states = set()

    def add():
        convert(work.adapter, target, force=replace)

    for wanted in itertools.count(1):

        def kill(number, name, wanted=wanted):
            if number == wanted:
                os.kill(os.getpid(), signal.SIGKILL)

        def killed(kill=kill):
            with steps(kill):
                add()

        status = in_child(killed)
        assert verify_bundle(work.bundle) == []
        listed = manifest(work.bundle)["adapters"]
        assert "other" in listed
        if "medical" in listed:
            assert snapshot(target) in (old, new)
            states.add("new" if snapshot(target) == new else "old")
        else:
            states.add("unlisted")
        if not os.WIFSIGNALED(status):
            assert status == 0
            break
        if manifest(work.bundle)["adapters"].get("medical") is None or replace:
            assert in_child(add) == 0  # the same command again completes it
        assert snapshot(target) == new
        assert verify_bundle(work.bundle) == []
        assert sorted(os.listdir(work.bundle / "adapters")) == ["medical", "other"]
        after = {name: d for name, d in snapshot(work.bundle).items() if "/" not in name}
        assert {n for n in after if after[n] != base.get(n)} == {"loraformat.json"}
        shutil.rmtree(work.bundle)
        shutil.copytree(start, work.bundle)
    assert wanted > 25
    assert states == ({"old", "unlisted", "new"} if replace else {"unlisted", "new"})


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO], ids=["ENOSPC", "EIO"])
def test_a_failure_at_every_step_of_a_replacement(work, snapshot, monkeypatch, number):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # it is counted, and fails, as before
    target = work.bundle / "adapters" / "medical"
    convert(work.adapter, target)
    (work.adapter / "README.md").write_text("the second version")
    start = work.path / "start"
    shutil.copytree(work.bundle, start)
    for wanted in itertools.count(1):

        def fail(step, name, wanted=wanted):
            if step == wanted:
                raise OSError(number, os.strerror(number))

        try:
            with steps(fail):
                convert(work.adapter, target, force=True)
        except LoraFormatError:
            assert verify_bundle(work.bundle) == []
            convert(work.adapter, target, force=True)
        else:
            break
        assert verify_bundle(work.bundle) == []
        assert snapshot(target) == snapshot(work.adapter)
        shutil.rmtree(work.bundle)
        shutil.copytree(start, work.bundle)
    assert wanted > 25


def test_of_many_writers_each_name_is_listed(work, start):
    names = [f"adapter-{number}" for number in range(5)]
    processes = [
        start("-m", "loraformat", "convert", "adapter", f"bundle/adapters/{name}", "-q")
        for name in names
    ]
    said = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * 5, said
    assert sorted(manifest(work.bundle)["adapters"]) == names
    assert verify_bundle(work.bundle) == []
    assert sorted(os.listdir(work.bundle / "adapters")) == names


def test_of_many_writers_of_one_name_one_wins(work, start, snapshot):
    line = ("-m", "loraformat", "convert", "adapter", "bundle/adapters/medical", "-q")
    processes = [start(*line) for _ in range(4)]
    said = [process.communicate(timeout=120)[1] for process in processes]
    assert sorted(process.returncode for process in processes) == [0, 5, 5, 5], said
    assert verify_bundle(work.bundle) == []
    assert snapshot(work.bundle / "adapters" / "medical") == snapshot(work.adapter)


def test_the_next_writer_removes_what_killed_ones_left(work):
    adapters = work.bundle / "adapters"
    for leftover in (".dead.partial", "..gone.partial"):
        shutil.copytree(work.adapter, adapters / leftover)
    (work.bundle / ".loraformat.json.without").write_text("half")
    alive = adapters / ".alive.partial"
    shutil.copytree(work.adapter, alive)
    with locked(alive) as alone:
        assert alone
        convert(work.adapter, adapters / "medical")
    assert sorted(os.listdir(adapters)) == [".alive.partial", "medical"]
    assert not (work.bundle / ".loraformat.json.without").exists()


def test_a_bundle_is_not_replaced_while_an_adapter_goes_in(work, snapshot):
    before = snapshot(work.bundle)
    with locked(work.bundle), pytest.raises(OutputError, match="being changed"):
        convert(work.base, work.bundle, force=True)
    assert snapshot(work.bundle) == before
    convert(work.base, work.bundle, force=True)


def test_a_kill_while_removing(work, snapshot, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    before = snapshot(work.bundle)
    target = work.bundle / "adapters" / "medical"
    for wanted in itertools.count(1):
        convert(work.adapter, target)

        def killed(wanted=wanted):
            def kill(number, name):
                if number == wanted:
                    os.kill(os.getpid(), signal.SIGKILL)

            with steps(kill):
                remove(target)

        status = in_child(killed)
        assert verify_bundle(work.bundle) == []
        if not os.WIFSIGNALED(status):
            break
        if target.exists() or any((work.bundle / "adapters").glob(".*")):
            remove(target)  # the same command again
        assert os.listdir(work.bundle / "adapters") == []
        assert snapshot(work.bundle) == before
    assert wanted > 5


def test_only_an_adapter_is_removed_without_the_manifest(work):
    other = work.bundle / "adapters" / "notes"
    other.mkdir(parents=True)
    (other / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="not an adapter listed in the manifest"):
        remove(other)
    assert (other / "mine.txt").read_text() == "mine"
