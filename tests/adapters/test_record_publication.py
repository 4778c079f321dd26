"""A merged model and its undo record: both appear, or neither, whatever goes wrong."""

import errno
import itertools
import os
import shutil
import signal

import pytest

from loraformat.errors import LoraFormatError, OutputError
from loraformat.ops.merge.merge import merge
from loraformat.ops.unmerge.unmerge import unmerge
from tests.adapters.merging import Q, adapter, delta, small, weights_of
from tests.adapters.test_bundle_adapters_crash import in_child
from tools.crash import steps

BOTH = ("out", "undo.lfu")


@pytest.fixture
def merging(tmp_path, monkeypatch):
    """A merge with a record, as a function of the adapter's seed."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # it is counted as before
    base, _ = small(tmp_path)

    def run(seed=1, **options):
        given = [adapter(delta(Q, 32, 32, seed=seed))]
        return merge(base, given, tmp_path / "out", undo=tmp_path / "undo.lfu", **options)

    return run


def belongs_to(path, seed):
    """Tell whether model and record in a directory are those of one merge."""
    given = [adapter(delta(Q, 32, 32, seed=seed))]
    try:
        unmerge(path / "out", path / "back", undo=path / "undo.lfu", adapter=given, force=True)
    except LoraFormatError:
        return False
    back, base = weights_of(path / "back"), weights_of(path / "base")
    shutil.rmtree(path / "back")
    return all(bool((back[name] == weight).all()) for name, weight in base.items())


def standing(path):
    return [name for name in BOTH if (path / name).exists()]


def clear(path):
    for entry in path.iterdir():
        if entry.name != "base":
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO], ids=["ENOSPC", "EIO"])
@pytest.mark.parametrize("force", [False, True], ids=["new", "replace"])
def test_a_failure_at_every_step(merging, tmp_path, force, number):
    for wanted in itertools.count(1):
        clear(tmp_path)
        if force:
            merging(seed=7)

        def fail(step, name, wanted=wanted):
            if step == wanted:
                raise OSError(number, os.strerror(number))

        try:
            with steps(fail):
                merging(force=force)
        except LoraFormatError:
            found = standing(tmp_path)
            assert found in ([], list(BOTH))
            assert not found or belongs_to(tmp_path, 1) or (force and belongs_to(tmp_path, 7))
            if not found or force:
                merging(force=force)
        else:
            break
        assert belongs_to(tmp_path, 1)
    assert wanted > 10


@pytest.mark.parametrize("force", [False, True], ids=["new", "replace"])
def test_the_same_command_completes_what_a_kill_interrupted(merging, tmp_path, force):
    states = set()
    for wanted in itertools.count(1):
        clear(tmp_path)
        if force:
            merging(seed=7)

        def killed(wanted=wanted):
            def kill(step, name):
                if step == wanted:
                    os.kill(os.getpid(), signal.SIGKILL)

            with steps(kill):
                merging(force=force)

        status = in_child(killed)
        found = standing(tmp_path)
        states.add(tuple(found))
        if not os.WIFSIGNALED(status):
            break
        if force or found != list(BOTH):
            merging(force=force)
        assert belongs_to(tmp_path, 1)
    assert wanted > 10
    assert ("undo.lfu",) in states or force  # a kill between the two


def test_another_merge_does_not_take_the_place_of_an_interrupted_ones_record(merging, tmp_path):
    merging(seed=7)
    (tmp_path / "out").rename(tmp_path / "out.partial")  # as a kill between the two leaves it
    (tmp_path / "out.partial/loraformat.journal").write_text("{}")
    record = (tmp_path / "undo.lfu").read_bytes()
    with pytest.raises(OutputError):
        merging(seed=1)
    assert (tmp_path / "undo.lfu").read_bytes() == record
    assert not (tmp_path / "out").exists()
