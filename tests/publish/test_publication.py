"""Publication by itself: what it refuses, what it leaves, which modes files get."""

import errno
import os
import stat
from pathlib import Path

import pytest

from loraformat.errors import OutputError, ResourceError
from loraformat.storage import atomic_output, atomic_swap
from loraformat.storage.atomic_output import AtomicOutput


def fill(publication, name="model.safetensors", data=b"new"):
    publication.write(name, data)


def make(directory, **files):
    directory.mkdir(parents=True)
    for name, text in (files or {"model": "old"}).items():
        (directory / f"{name}.safetensors").write_text(text)
    return directory


@pytest.mark.parametrize(
    ("mask", "file_mode", "directory_mode"), [(0o022, 0o644, 0o755), (0o027, 0o640, 0o750)]
)
def test_modes_follow_the_umask(tmp_path, mask, file_mode, directory_mode):
    before = os.umask(mask)
    try:
        with AtomicOutput(tmp_path / "out", plan="p") as publication:
            fill(publication)
            fill(publication, "sub/notes.txt")
            publication.commit()
    finally:
        os.umask(before)
    modes = {
        str(path.relative_to(tmp_path)): stat.S_IMODE(path.stat().st_mode)
        for path in tmp_path.rglob("*")
    }
    assert modes == {
        "out": directory_mode,
        "out/model.safetensors": file_mode,
        "out/sub": directory_mode,
        "out/sub/notes.txt": file_mode,
    }


def test_nothing_appears_before_commit_and_nothing_else_after(tmp_path):
    target = tmp_path / "out"
    with AtomicOutput(target, plan="p") as publication:
        fill(publication)
        assert not target.exists()
        publication.commit()
        assert sorted(path.name for path in target.iterdir()) == ["model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_without_commit_nothing_is_left(tmp_path):
    with AtomicOutput(tmp_path / "out", plan="p") as publication:
        fill(publication)
        publication.record("model.safetensors", {})
    assert list(tmp_path.iterdir()) == []


def test_an_empty_directory_is_taken(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    with AtomicOutput(target, plan="p") as publication:
        fill(publication)
        publication.commit()
    assert (target / "model.safetensors").read_bytes() == b"new"


def test_an_existing_output_is_refused_and_untouched(tmp_path):
    target = make(tmp_path / "out")
    with (
        pytest.raises(OutputError, match="already exists; use --force"),
        AtomicOutput(target, plan="p"),
    ):
        pass
    assert (target / "model.safetensors").read_text() == "old"
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("fallback", [False, True])
def test_force_replaces_the_whole_directory(tmp_path, monkeypatch, fallback):
    if fallback:  # as on a file system that cannot exchange
        monkeypatch.setattr(atomic_swap, "_exchange_at_once", cannot)
    target = make(tmp_path / "out", model="old", another="old")
    with AtomicOutput(target, plan="p", force=True) as publication:
        fill(publication)
        assert (target / "model.safetensors").read_text() == "old"
        publication.commit()
    assert {path.name: path.read_text() for path in target.iterdir()} == {
        "model.safetensors": "new"
    }
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def cannot(one, other):
    raise OSError(errno.EINVAL, "cannot")


def test_a_failed_exchange_puts_the_old_output_back(tmp_path, monkeypatch):
    one, other = make(tmp_path / "one", a="1"), make(tmp_path / "other", a="2")
    rename, calls = os.rename, []

    def second_fails(source, target):
        calls.append(source)
        if len(calls) == 2:
            raise OSError(errno.EIO, "no")
        rename(source, target)

    monkeypatch.setattr(atomic_swap, "_exchange_at_once", cannot)
    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(OSError, match="no"):
        atomic_swap.swap_directories(one, other)
    assert ((one / "a.safetensors").read_text(), (other / "a.safetensors").read_text()) == (
        "1",
        "2",
    )


def test_other_errors_of_the_exchange_are_not_worked_around(tmp_path):
    with pytest.raises(FileNotFoundError):
        atomic_swap.swap_directories(tmp_path / "a", tmp_path / "b")


def test_an_output_that_a_killed_exchange_put_aside_comes_back(tmp_path):
    make(tmp_path / "out.partial.old")
    with (
        pytest.raises(OutputError, match="already exists"),
        AtomicOutput(tmp_path / "out", plan="p"),
    ):
        pass
    assert (tmp_path / "out" / "model.safetensors").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_killed_exchange_put_aside_goes_once_it_was_replaced(tmp_path):
    target = make(tmp_path / "out")
    make(tmp_path / "out.partial.old")
    with AtomicOutput(target, plan="p", force=True) as publication:
        fill(publication)
        publication.commit()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_force_does_not_replace_what_is_no_model(tmp_path):
    target = tmp_path / "home"
    target.mkdir()
    (target / "letter.txt").write_text("dear")
    with (
        pytest.raises(OutputError, match="without weights"),
        AtomicOutput(target, plan="p", force=True),
    ):
        pass
    assert (target / "letter.txt").read_text() == "dear"


def test_force_does_not_lose_adapters(tmp_path):
    target = make(tmp_path / "out")
    (target / "adapters" / "polite").mkdir(parents=True)
    with (
        pytest.raises(OutputError, match="holds adapters that would be lost: polite"),
        AtomicOutput(target, plan="p", force=True),
    ):
        pass


@pytest.mark.parametrize("kind", ["file", "link", "dangling", "fifo"])
def test_an_output_that_is_no_directory_is_refused(tmp_path, kind):
    target = tmp_path / "out"
    if kind == "file":
        target.write_text("text")
    elif kind == "link":
        target.symlink_to(make(tmp_path / "elsewhere"))
    elif kind == "dangling":
        target.symlink_to(tmp_path / "nowhere")
    else:
        os.mkfifo(target)
    with pytest.raises(OutputError), AtomicOutput(target, plan="p", force=True):
        pass
    assert os.path.lexists(target)
    assert not list(tmp_path.glob("*.partial"))


def test_a_mount_point_is_refused():
    with pytest.raises(OutputError, match="mount point"), AtomicOutput(Path("/proc"), plan="p"):
        pass


def test_a_missing_parent_is_named(tmp_path):
    with (
        pytest.raises(OutputError, match="no such directory; create it first"),
        AtomicOutput(tmp_path / "a" / "b", plan="p"),
    ):
        pass


def test_a_name_that_is_too_long_is_refused(tmp_path):
    with (
        pytest.raises(OutputError, match="name too long"),
        AtomicOutput(tmp_path / ("x" * 252), plan="p"),
    ):
        pass


def test_something_that_appears_meanwhile_is_not_replaced(tmp_path):
    target = tmp_path / "out"
    with (
        pytest.raises(OutputError, match="already exists"),
        AtomicOutput(target, plan="p") as publication,
    ):
        fill(publication)
        make(target)
        publication.commit()
    assert (target / "model.safetensors").read_text() == "old"
    assert not list(tmp_path.glob("*.partial"))


# The output is the input


def inputs_of(directory):
    return [directory, *(path for path in directory.rglob("*") if path.is_file())]


@pytest.mark.parametrize(
    "way", ["path", "dotted", "symlink", "inside", "around", "hardlink", "linked file"]
)
def test_the_input_is_never_the_output(tmp_path, snapshot, way):
    source = make(tmp_path / "rooms" / "source")
    before = snapshot(source)
    target = {
        "path": source,
        "dotted": source / ".." / "source",
        "symlink": tmp_path / "link",
        "inside": source / "output",
        "around": tmp_path / "rooms",
    }.get(way, tmp_path / "other")
    if way == "symlink":
        target.symlink_to(source)
    if way in ("hardlink", "linked file"):
        target.mkdir()
        link = target / "model.safetensors"
        if way == "hardlink":
            link.hardlink_to(source / "model.safetensors")
        else:
            link.symlink_to(source / "model.safetensors")
    with (
        pytest.raises(OutputError, match="input"),
        AtomicOutput(target, plan="p", inputs=inputs_of(source), force=True),
    ):
        pass
    assert snapshot(source) == before


@pytest.mark.parametrize("place", ["out.partial", "out.partial/model"])
def test_an_input_where_the_work_directory_goes_is_not_emptied(tmp_path, snapshot, place):
    source = make(tmp_path / place)
    before = snapshot(source)
    with (
        pytest.raises(OutputError, match=r"is or contains the input, but is needed to prepare"),
        AtomicOutput(tmp_path / "out", plan="p", inputs=inputs_of(source)),
    ):
        pass
    assert snapshot(source) == before


# Work directories


def interrupted(target, plan, *names):
    with pytest.raises(KeyboardInterrupt), AtomicOutput(target, plan=plan) as publication:
        for name in names:
            fill(publication, name)
            publication.record(name, {"of": name})
        (publication.work / "unfinished.tmp").write_bytes(b"half")
        raise KeyboardInterrupt


def test_the_same_plan_is_continued_and_only_finished_files_are_kept(tmp_path):
    interrupted(tmp_path / "out", "plan", "one.safetensors")
    (tmp_path / "out.partial" / "stray").write_text("?")
    with AtomicOutput(tmp_path / "out", plan="plan") as publication:
        assert publication.resumed == {"one.safetensors": {"of": "one.safetensors"}}
        names = {path.name for path in publication.work.iterdir()}
        assert names == {"one.safetensors", ".loraformat-journal.json"}
        fill(publication, "two.safetensors")
        publication.commit()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "one.safetensors",
        "two.safetensors",
    }


def test_an_interruption_before_anything_is_finished_leaves_nothing(tmp_path):
    interrupted(tmp_path / "out", "plan")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "journal", [None, b"", b"[]", b'{"plan": "other", "done": {}}', b'{"done": 1}']
)
def test_another_plan_or_a_broken_journal_starts_anew(tmp_path, journal):
    interrupted(tmp_path / "out", "plan", "one.safetensors")
    if journal is not None:
        (tmp_path / "out.partial" / ".loraformat-journal.json").write_bytes(journal)
    with AtomicOutput(tmp_path / "out", plan="another plan") as publication:
        assert publication.resumed == {}
        assert [path.name for path in publication.work.iterdir()] == [".loraformat-journal.json"]


def test_a_work_directory_without_journal_is_taken_if_it_is_a_model(tmp_path):
    make(tmp_path / "out.partial")  # as a kill between two steps of publishing leaves it
    with AtomicOutput(tmp_path / "out", plan="p") as publication:
        fill(publication)
        publication.commit()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_strangers_directory_of_that_name_is_left_alone(tmp_path):
    stranger = tmp_path / "out.partial"
    stranger.mkdir()
    (stranger / "thesis.tex").write_text("years of work")
    with (
        pytest.raises(OutputError, match="not a work directory of loraformat"),
        AtomicOutput(tmp_path / "out", plan="p"),
    ):
        pass
    assert (stranger / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("kind", ["file", "link", "fifo"])
def test_something_else_of_that_name_is_refused(tmp_path, kind):
    work = tmp_path / "out.partial"
    if kind == "file":
        work.write_text("mine")
    elif kind == "link":
        work.symlink_to(make(tmp_path / "elsewhere"))
    else:
        os.mkfifo(work)
    with (
        pytest.raises(OutputError, match="is not a directory"),
        AtomicOutput(tmp_path / "out", plan="p"),
    ):
        pass
    assert os.path.lexists(work)


def test_a_full_disk_keeps_finished_files_and_other_errors_do_not(tmp_path):
    for number, kind, left in (
        (errno.ENOSPC, ResourceError, True),
        (errno.EIO, OutputError, False),
    ):
        with pytest.raises(kind), AtomicOutput(tmp_path / "out", plan="p") as publication:
            fill(publication)
            publication.record("model.safetensors", {})
            raise OSError(number, os.strerror(number))
        assert (tmp_path / "out.partial").exists() is left


def test_file_systems_that_cannot_sync_a_directory_are_tolerated(tmp_path, monkeypatch):
    fsync = os.fsync

    def only_files(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "cannot")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", only_files)
    with AtomicOutput(tmp_path / "out", plan="p") as publication:
        fill(publication)
        publication.commit()
    assert (tmp_path / "out").is_dir()


def test_check_space(tmp_path, monkeypatch):
    usage = atomic_output.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(atomic_output.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with AtomicOutput(tmp_path / "out", plan="p") as publication:
        publication.check_space(900)
        with pytest.raises(ResourceError, match=r"needs 0\.0 MB, and the disk has 0\.0 MB free"):
            publication.check_space(1000)
