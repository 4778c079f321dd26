"""Every step on the disk may fail: then the old output stays, or the new one is whole."""

import errno
import os
import resource
import shutil
import stat
import subprocess
import sys
from collections import namedtuple

import pytest

from loraformat.errors import FileChangedError, LoraFormatError, OutputError, ResourceError
from loraformat.ops.convert.convert import convert
from tools.crash import steps, write_model

LIMIT = 60_000


def run(model, target, **options):
    return convert(model, target, to_format="safetensors", max_shard_size=LIMIT, **options)


@pytest.fixture
def reference(model, tmp_path, snapshot):
    run(model, tmp_path / "reference")
    found = snapshot(tmp_path / "reference")
    shutil.rmtree(tmp_path / "reference")
    return found


def fail_at(wanted, number):
    def act(step, name):
        if step == wanted:
            raise OSError(number, os.strerror(number))

    return act


@pytest.mark.parametrize("replace", [False, True], ids=["new", "replace"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO], ids=["ENOSPC", "EIO"])
def test_a_failure_at_every_step(tmp_path, snapshot, monkeypatch, number, replace):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # it is counted, and fails, as before
    model = write_model(tmp_path / "model", layers=2)
    room, target = tmp_path / "room", tmp_path / "room" / "out"
    room.mkdir()
    run(model, target)
    reference = snapshot(target)
    old = prepare(model, target, replace, snapshot)
    for wanted in range(1, count_steps(model, target, replace) + 1):
        old = prepare(model, target, replace, snapshot)
        with pytest.raises(LoraFormatError) as caught, steps(fail_at(wanted, number)):
            run(model, target, force=replace)
        now = snapshot(target)
        assert now in (old, reference)
        if now == old:
            kind = ResourceError if number == errno.ENOSPC else OutputError
            assert type(caught.value) is kind
        assert {path.name for path in room.iterdir()} <= {"out", "out.partial"}
        run(model, target, force=True)  # a rerun completes it
        assert snapshot(target) == reference
        assert list(room.iterdir()) == [target]
    assert wanted > 40


def prepare(model, target, replace, snapshot):
    """Put the old output, or none, in place."""
    shutil.rmtree(target)
    if not replace:
        return {}
    convert(model, target, to_format="safetensors", dtype="f16")
    return snapshot(target)


def count_steps(model, target, replace):
    seen = []
    with steps(lambda step, name: seen.append(step)):
        run(model, target, force=replace)
    return len(seen)


def test_every_rename_is_between_two_syncs(model, tmp_path, monkeypatch):
    """The file is on the disk before it gets its name; then the name is."""
    log = []
    fsync, replace, rename = os.fsync, os.replace, os.rename

    def watch_sync(descriptor):
        status = os.fstat(descriptor)
        log.append(("sync", status.st_ino, stat.S_ISDIR(status.st_mode)))
        fsync(descriptor)

    def watch(function):
        def call(source, target):
            inode = os.stat(source).st_ino
            log.append(("rename", inode, os.stat(os.path.dirname(target)).st_ino, str(target)))
            function(source, target)

        return call

    monkeypatch.setattr(os, "fsync", watch_sync)
    monkeypatch.setattr(os, "replace", watch(replace))
    monkeypatch.setattr(os, "rename", watch(rename))
    run(model, tmp_path / "out")
    renames = [index for index, entry in enumerate(log) if entry[0] == "rename"]
    assert len(renames) > 8
    for index in renames:
        _, inode, directory, _ = log[index]
        assert ("sync", inode) == log[index - 1][:2]
        assert log[index + 1] == ("sync", directory, True)
    assert log[renames[-1]][3] == str(tmp_path / "out")


def test_strace_agrees(model, tmp_path, command):
    """The same, seen by the kernel, where strace is installed and may trace."""
    if not (shutil.which("strace") and traces()):
        return  # the test above has looked at the same order from inside
    log = tmp_path / "log"
    tracer = ["strace", "-f", "-y", "-o", log, "-e", "trace=fsync,rename,renameat,renameat2"]
    convert_it = ["-m", "loraformat", "convert", model, tmp_path / "out", "--to", "safetensors"]
    subprocess.run([*tracer, sys.executable, *convert_it, "-q"], check=True)
    lines = [line.split(maxsplit=1)[1] for line in log.read_text().splitlines()]
    calls = [line for line in lines if line.startswith(("fsync", "rename"))]
    renames = [index for index, line in enumerate(calls) if line.startswith("rename")]
    assert len(renames) >= 5
    for index in renames:
        assert calls[index - 1].startswith("fsync")
        assert calls[index + 1].startswith("fsync")


def traces():
    return subprocess.run(["strace", "-o", os.devnull, "true"], capture_output=True).returncode == 0


def test_free_space_is_checked_before_the_first_byte(model, tmp_path, monkeypatch):
    Usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**6, 10**6 - 1000, 1000))
    names = []
    with (
        steps(lambda step, name: names.append(name)),
        pytest.raises(ResourceError, match="MB free"),
    ):
        run(model, tmp_path / "out")
    assert names.count("write") == 1  # the journal
    assert not list(tmp_path.glob("out*"))


def test_a_disk_that_gets_full_on_the_way(model, tmp_path, command, snapshot, reference):
    """A real one where a file system may be mounted, else a limit on the size of files."""
    disk = tmp_path / "disk"
    disk.mkdir()
    # Room enough, so that the check passes, but not for so many files.
    mounted = mount(disk, "size=1m,nr_inodes=7")
    arguments = ("convert", model, disk / "out", "--to", "safetensors", "--max-shard-size", LIMIT)
    try:
        result = command(*arguments, preexec_fn=None if mounted else limit_files)
        assert result.returncode == 6
        assert one_line(result.stderr)
        assert [path.name for path in disk.iterdir()] == ["out.partial"]  # with what is finished
        assert list((disk / "out.partial").glob("model-*.safetensors"))
        if mounted:
            mount(disk, "remount,nr_inodes=100")
        result = command(*arguments)
        assert (result.returncode, result.stderr) == (0, "")
        assert snapshot(disk / "out") == reference
    finally:
        if mounted:
            subprocess.run(["umount", disk], check=True)


def test_a_limit_on_the_size_of_files(model, tmp_path, command, snapshot, reference):
    arguments = (
        "convert",
        model,
        tmp_path / "out",
        "--to",
        "safetensors",
        "--max-shard-size",
        LIMIT,
    )
    result = command(*arguments, preexec_fn=limit_files)
    assert result.returncode == 6
    assert one_line(result.stderr)
    assert "--max-shard-size" in result.stderr
    assert not (tmp_path / "out").exists()
    assert command(*arguments).returncode == 0
    assert snapshot(tmp_path / "out") == reference


def limit_files():
    """Stop between the first shard (36,864 bytes) and the second (37,120)."""
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (37_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    )


def mount(directory, options):
    try:
        arguments = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", directory]
        return subprocess.run(arguments, capture_output=True).returncode == 0
    except OSError:
        return False


def one_line(text):
    return text.startswith("error: ") and text.count("\n") == 1


def test_a_directory_that_may_not_be_written(model, tmp_path, command):
    parent = tmp_path / "readonly"
    parent.mkdir(mode=0o555)
    if os.geteuid() == 0:  # whom modes do not stop: so become somebody whom they do
        result = as_nobody(model, parent / "out")
    else:
        result = command("convert", model, parent / "out", "--to", "safetensors")
    assert result.returncode == 5
    assert one_line(result.stderr)
    assert "Permission denied" in result.stderr
    assert list(parent.iterdir()) == []


def as_nobody(model, target):
    """Convert as user 65534, in a fork: nobody may not even reach the interpreter's files."""
    reading, writing = os.pipe()
    process = os.fork()
    if not process:
        from loraformat.cli import main

        sys.stderr = os.fdopen(writing, "w")
        reach(model)
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        try:
            main(["convert", str(model), str(target), "--to", "safetensors", "-q"])
        except SystemExit as leave:
            sys.stderr.flush()
            os._exit(leave.code)
        os._exit(99)
    os.close(writing)
    with os.fdopen(reading) as file:
        text = file.read()
    _, status = os.waitpid(process, 0)
    return subprocess.CompletedProcess([], os.waitstatus_to_exitcode(status), "", text)


def reach(directory):
    """Let others pass through the private directories that pytest makes."""
    for path in directory.iterdir():
        path.chmod(0o644)
    for parent in (directory, *directory.parents):
        if "pytest" in str(parent):
            parent.chmod(parent.stat().st_mode | 0o055)


# The input changes


@pytest.mark.parametrize("change", ["touched", "grown", "shrunk"])
def test_an_input_that_changes_is_noticed(model, tmp_path, monkeypatch, change):
    monkeypatch.setenv("LORAFORMAT_IO", "pread")
    weights = model / "model.safetensors"

    def meddle(done, total):
        size = weights.stat().st_size
        if change == "touched":
            os.utime(weights, ns=(1, 1))
        else:
            os.truncate(weights, size + 8 if change == "grown" else 2000)

    with pytest.raises(FileChangedError, match=r"model\.safetensors"):
        run(model, tmp_path / "out", progress=meddle)
    assert not list(tmp_path.glob("out*"))


def test_a_replaced_input_is_read_to_its_end(model, tmp_path, snapshot, reference):
    """Whoever writes beside and renames, as we do, disturbs nobody."""

    def replace(done, total):
        beside = model / "beside.tmp"
        beside.write_bytes(b"other")
        os.replace(beside, model / "model.safetensors")

    run(model, tmp_path / "out", progress=replace)
    assert snapshot(tmp_path / "out") == reference


def test_pread_reads_the_same_bytes(model, tmp_path, monkeypatch, snapshot, reference):
    monkeypatch.setenv("LORAFORMAT_IO", "pread")
    run(model, tmp_path / "out")
    assert snapshot(tmp_path / "out") == reference
