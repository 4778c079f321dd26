"""Several processes, signals and kills."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from loraformat.errors import OutputError
from loraformat.ops.convert.convert import convert
from loraformat.storage.atomic_output import AtomicOutput

ROOT = Path(__file__).parents[2]
LIMIT = 20_000

#: A conversion that stops for good when five tensors are written.
STUCK = """
import sys, time
from loraformat.cli import main
from loraformat.ops.convert import convert as module

class Stuck(module.ModelOutput):
    def __init__(self, *arguments, progress, **options):
        super().__init__(*arguments, progress=self.stop_at_the_fifth, **options)
        self.seen = 0

    def stop_at_the_fifth(self, done, total):
        self.seen += 1
        if self.seen == 5:
            print("stuck", flush=True)
            time.sleep(100)

module.ModelOutput = Stuck
main(sys.argv[1:])
"""


@pytest.fixture
def stuck(start, model, tmp_path):
    """Starts a conversion to ``out`` and waits until it hangs in the middle."""

    def begin(*options):
        process = start(
            "-c", STUCK, "convert", model, "out", "--to", "safetensors",
            "--max-shard-size", LIMIT, *options, cwd=tmp_path,
        )  # fmt: skip
        line = process.stdout.readline()
        assert line == "stuck\n", process.stderr.read()
        return process

    return begin


@pytest.fixture
def reference(model, tmp_path, snapshot):
    convert(model, tmp_path / "reference", to_format="safetensors", max_shard_size=LIMIT)
    return snapshot(tmp_path / "reference")


def rerun(model, tmp_path):
    convert(model, tmp_path / "out", to_format="safetensors", max_shard_size=LIMIT)


def test_a_second_writer_is_refused_and_told_who_is_first(stuck, command, model, tmp_path):
    first = stuck()
    result = command("convert", model, "out", "--to", "safetensors")
    assert result.returncode == 5
    assert result.stderr == (
        f"error: {tmp_path / 'out'}: is being written by another process (process {first.pid}); "
        "wait for it to end\n"
    )
    assert first.poll() is None


def test_a_kill_frees_the_lock_and_a_rerun_completes(stuck, model, tmp_path, snapshot, reference):
    first = stuck()
    first.kill()
    first.wait()
    assert (tmp_path / "out.partial").is_dir()
    rerun(model, tmp_path)
    assert snapshot(tmp_path / "out") == reference
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(stuck, command, model, tmp_path, snapshot, reference, number):
    process = stuck()
    finished = {path.name for path in (tmp_path / "out.partial").glob("model-*.safetensors")}
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    again = f"loraformat convert {model} out --to safetensors --max-shard-size {LIMIT}"
    assert said.strip() == f"error: interrupted; no output is damaged. To continue, run: {again}"
    assert "Traceback" not in said
    kept = {path.name for path in (tmp_path / "out.partial").iterdir()}
    assert kept == finished | {".loraformat-journal.json"}
    assert not (tmp_path / "out").exists()
    result = command(*again.split()[1:])
    assert (result.returncode, result.stderr) == (0, "")
    assert snapshot(tmp_path / "out") == reference


def test_interrupting_a_replacement_leaves_the_old_output(stuck, model, tmp_path, snapshot):
    convert(model, tmp_path / "out", to_format="safetensors", dtype="f16")
    old = snapshot(tmp_path / "out")
    process = stuck("--force")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130
    assert snapshot(tmp_path / "out") == old


def test_of_many_writers_one_wins(start, model, tmp_path, snapshot, reference):
    arguments = ("-m", "loraformat", "convert", model, "out", "--to", "safetensors",
                 "--max-shard-size", LIMIT, "-q")  # fmt: skip
    processes = [start(*arguments, cwd=tmp_path) for _ in range(6)]
    said = [process.communicate(timeout=60)[1] for process in processes]
    assert sorted(process.returncode for process in processes) == [0, 5, 5, 5, 5, 5], said
    assert snapshot(tmp_path / "out") == reference
    assert not (tmp_path / "out.partial").exists()


def test_many_replacing_writers_leave_one_whole_output(start, model, tmp_path, snapshot, reference):
    arguments = ("-m", "loraformat", "convert", model, "out", "--to", "safetensors",
                 "--max-shard-size", LIMIT, "-q", "--force")  # fmt: skip
    for _ in range(2):
        processes = [start(*arguments, cwd=tmp_path) for _ in range(4)]
        said = [process.communicate(timeout=60)[1] for process in processes]
        assert {process.returncode for process in processes} <= {0, 5}, said
        assert 0 in [process.returncode for process in processes]
        assert snapshot(tmp_path / "out") == reference
        assert not (tmp_path / "out.partial").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux swaps two directories at once")
def test_readers_never_see_a_mix_or_nothing(tmp_path):
    """A reader that opens the directory once sees one state; the path always leads to one."""
    names = [f"part-{n}.safetensors" for n in range(5)]

    def publish(generation):
        with AtomicOutput(tmp_path / "out", plan=str(generation), force=True) as publication:
            for name in names:
                publication.write(name, str(generation).encode())
            publication.commit()

    publish(0)
    stop, problems, looks = threading.Event(), [], []

    def look():
        while not stop.is_set():
            try:
                directory = os.open(tmp_path / "out", os.O_RDONLY)
            except OSError as error:
                problems.append(error)
                return
            try:
                seen = {read_at(name, directory) for name in names}
            except FileNotFoundError:
                seen = set()  # it was replaced and removed while we looked: not the path's fault
            finally:
                os.close(directory)
            looks.append(seen)
            if len(seen) > 1:
                problems.append(seen)

    readers = [threading.Thread(target=look) for _ in range(2)]
    for reader in readers:
        reader.start()
    for generation in range(1, 40):
        publish(generation)
    stop.set()
    for reader in readers:
        reader.join()
    assert problems == []
    assert len(set().union(*looks)) > 1


def read_at(name, directory):
    descriptor = os.open(name, os.O_RDONLY, dir_fd=directory)
    try:
        return os.read(descriptor, 100)
    finally:
        os.close(descriptor)


def test_a_lock_within_one_process(tmp_path):
    with AtomicOutput(tmp_path / "out", plan="p") as publication:
        with (
            pytest.raises(OutputError, match=rf"by another process \(process {os.getpid()}\)"),
            AtomicOutput(tmp_path / "out", plan="p"),
        ):
            pass
        publication.write("model.safetensors", b"")
        publication.commit()


# Kills: tools/crash.py, as people run it with larger numbers


def crash(*arguments):
    result = subprocess.run(
        [sys.executable, ROOT / "tools" / "crash.py", *arguments],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, f"{arguments}: {result.stdout}{result.stderr}"
    return json.loads(result.stdout)


def test_kills_at_random_moments():
    report = crash("--kills", "40", "--seed", str(int(time.time())))
    assert report["killed"] + report.get("too late", 0) == 40
    assert report["killed"] >= 5  # how many come too late depends on the machine


def test_kills_at_random_moments_while_replacing():
    report = crash(
        "--kills", "20", "--replace", "--to", "safetensors", "--max-shard-bytes", "60000"
    )
    assert "left nothing" not in report


@pytest.mark.parametrize("options", [(), ("--replace",)], ids=["new", "replace"])
def test_a_kill_before_every_step(options):
    fast = ("--no-sync", "--to", "safetensors", "--max-shard-bytes", "150000")
    report = crash("--every-step", *fast, *options)
    assert report["killed"] == report["finished"] == report["steps"] > 50
