"""Publishing a single file: what is refused, what is left, what another process may do."""

import contextlib
import errno
import itertools
import os
import signal
import stat

import pytest

from loraformat import plugins
from loraformat.errors import LoraFormatError, OutputError, UsageError
from loraformat.storage import atomic_file
from loraformat.storage.atomic_file import AtomicFile, open_publication
from loraformat.storage.atomic_output import AtomicOutput
from tools.crash import steps


def fill(publication, data=b"new"):
    publication.write(publication.file_name, data)


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_a_file_appears_whole_at_commit_with_the_umask_s_mode(tmp_path):
    target = tmp_path / "model.gguf"
    before = os.umask(0o027)
    try:
        with AtomicFile(target, plan="p") as publication:
            fill(publication)
            assert not target.exists()
            publication.commit()
    finally:
        os.umask(before)
    assert target.read_bytes() == b"new" and stat.S_IMODE(target.stat().st_mode) == 0o640
    assert target.stat().st_nlink == 1
    assert names(tmp_path) == ["model.gguf"]


def test_without_commit_nothing_is_left(tmp_path):
    with AtomicFile(tmp_path / "model.gguf", plan="p") as publication:
        fill(publication)
    assert names(tmp_path) == []


def test_an_interrupted_file_that_was_recorded_is_offered_again(tmp_path):
    target = tmp_path / "model.gguf"
    with pytest.raises(KeyboardInterrupt), AtomicFile(target, plan="p") as publication:
        fill(publication)
        publication.record(publication.file_name, {"bytes": 3})
        raise KeyboardInterrupt
    assert names(tmp_path) == ["model.gguf.partial"]
    with AtomicFile(target, plan="p") as publication:
        assert publication.resumed == {"model.gguf": {"bytes": 3}}
        publication.commit()
    assert names(tmp_path) == ["model.gguf"] and target.read_bytes() == b"new"


@pytest.mark.parametrize("force", [False, True])
def test_an_existing_file_is_replaced_only_with_force(tmp_path, force):
    target = tmp_path / "model.gguf"
    target.write_bytes(b"old")
    if force:
        with AtomicFile(target, plan="p", force=True) as publication:
            fill(publication)
            assert target.read_bytes() == b"old"
            publication.commit()
    else:
        with (
            pytest.raises(OutputError, match="already exists; use --force"),
            AtomicFile(target, plan="p"),
        ):
            pass
    assert target.read_bytes() == (b"new" if force else b"old")
    assert names(tmp_path) == ["model.gguf"]


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda target: target.mkdir(), "is not a file"),
        (lambda target: target.symlink_to("x.gguf"), "is a symbolic link"),
        (lambda target: os.mkfifo(target), "is not a file"),
    ],
)
def test_force_replaces_nothing_but_a_file(tmp_path, make, problem):
    target = tmp_path / "model.gguf"
    make(target)
    with (
        pytest.raises(OutputError, match=problem),
        AtomicFile(target, plan="p", force=True),
    ):
        pass
    assert os.path.lexists(target) and names(tmp_path) == ["model.gguf"]


def test_force_does_not_replace_what_is_no_model_by_its_name(tmp_path):
    target = tmp_path / "thesis.txt"
    target.write_text("years of work")
    with (
        pytest.raises(OutputError, match="does not have the name of a weight file"),
        AtomicFile(target, plan="p", force=True),
    ):
        pass
    assert target.read_text() == "years of work"


@pytest.mark.parametrize("link", [None, os.link, os.symlink])
def test_the_input_is_never_the_output(tmp_path, link):
    source, target = tmp_path / "in.gguf", tmp_path / "out.gguf"
    source.write_bytes(b"old")
    if link is None:
        target = source
    else:
        link(source, target)
    with (
        pytest.raises(OutputError),
        AtomicFile(target, plan="p", inputs=[source], force=True),
    ):
        pass
    assert source.read_bytes() == b"old" and not list(tmp_path.glob("*.partial"))


def test_a_file_that_appears_meanwhile_is_not_overwritten(tmp_path, monkeypatch):
    target = tmp_path / "model.gguf"
    with (
        pytest.raises(OutputError, match="already exists"),
        AtomicFile(target, plan="p") as publication,
    ):
        fill(publication)
        target.write_bytes(b"theirs")
        publication.commit()
    assert target.read_bytes() == b"theirs"
    target.unlink()
    monkeypatch.setattr(atomic_file, "refuse_existing_file", lambda target, force: None)
    with (
        pytest.raises(OutputError, match="has appeared meanwhile"),
        AtomicFile(target, plan="p") as publication,
    ):
        fill(publication)
        target.write_bytes(b"theirs")
        publication.commit()
    assert target.read_bytes() == b"theirs" and names(tmp_path) == ["model.gguf"]


def test_a_file_system_without_hard_links(tmp_path, monkeypatch):
    def cannot(source, target):
        raise PermissionError

    monkeypatch.setattr(os, "link", cannot)
    with AtomicFile(tmp_path / "model.gguf", plan="p") as publication:
        fill(publication)
        publication.commit()
    assert names(tmp_path) == ["model.gguf"]


def publish(target, *, force):
    with AtomicFile(target, plan="p", force=force) as publication:
        fill(publication)
        publication.record(publication.file_name, {"bytes": 3})
        publication.commit()


def in_child(work):
    """Do it in a child and return its status, as `os.wait` gives it."""
    if child := os.fork():
        return os.waitpid(child, 0)[1]
    try:
        work()
        os._exit(0)
    except BaseException:
        os._exit(1)


@pytest.mark.parametrize("force", [False, True], ids=["new", "replace"])
def test_a_kill_before_every_step(tmp_path, monkeypatch, force):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # a kill does not need it
    target, states = tmp_path / "model.gguf", set()
    for wanted in itertools.count(1):
        if force:
            target.write_bytes(b"old")

        def killed(wanted=wanted):
            def kill(number, name):
                if number == wanted:
                    os.kill(os.getpid(), signal.SIGKILL)

            with steps(kill):
                publish(target, force=force)

        if not os.WIFSIGNALED(in_child(killed)):
            break
        states.add(target.read_bytes() if target.exists() else None)
        publish(target, force=True)  # the same again completes it, and tidies up
        assert target.read_bytes() == b"new" and target.stat().st_nlink == 1
        assert names(tmp_path) == ["model.gguf"]
        target.unlink()
    assert wanted > 15
    assert states == ({b"old", b"new"} if force else {None, b"new"})


@pytest.mark.parametrize("force", [False, True], ids=["new", "replace"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO], ids=["ENOSPC", "EIO"])
def test_a_failure_at_every_step(tmp_path, force, number):
    target = tmp_path / "model.gguf"
    for wanted in itertools.count(1):
        if force:
            target.write_bytes(b"old")

        last = 0

        def fail(step, name, wanted=wanted):
            nonlocal last
            last = step
            if step == wanted:
                raise OSError(number, os.strerror(number))

        with contextlib.suppress(LoraFormatError), steps(fail):
            publish(target, force=force)
        now = target.read_bytes() if target.exists() else None
        assert now in (b"new", b"old" if force else None)
        if last < wanted:
            break
        publish(target, force=True)
        assert target.read_bytes() == b"new" and names(tmp_path) == ["model.gguf"]
        target.unlink()


def test_two_writers_of_one_file(tmp_path):
    target = tmp_path / "model.gguf"
    with (
        AtomicFile(target, plan="p"),
        pytest.raises(OutputError, match="being written by another process"),
        AtomicFile(target, plan="p"),
    ):
        pass


def test_a_converter_says_what_it_makes(tmp_path):
    assert type(open_publication("directory", tmp_path / "a", plan="p")) is AtomicOutput
    assert type(open_publication("file", tmp_path / "a", plan="p")) is AtomicFile


def test_the_suffix_chooses_by_kind(monkeypatch, tmp_path):
    def writer(name, kind):
        return kind(
            name=name, summary="", sniff=lambda path: False, read=print, write=print,
            output="file", suffixes=(".gguf",),
        )  # fmt: skip

    base, adapter = plugins.BaseFormat, plugins.AdapterFormat
    made = {base: writer("base-gguf", base), adapter: writer("lora-gguf", adapter)}
    monkeypatch.setattr(plugins, "all_converters", lambda: list(made.values()))
    monkeypatch.setattr(plugins, "get", lambda name: {c.name: c for c in made.values()}[name])
    for kind, converter in made.items():
        given = plugins.for_output(tmp_path / "x.gguf", None, kind, "safetensors")
        assert given is converter
    del made[adapter]
    with pytest.raises(UsageError, match=r"no installed converter writes an adapter as \.gguf"):
        plugins.for_output(tmp_path / "x.gguf", None, adapter, "peft")
